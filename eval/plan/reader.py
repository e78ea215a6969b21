"""YAML that knows its lines: every mistake in a table is an error with file and line."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import yaml

DEEPEST = 20  # levels of nesting; a table has five


class ConfigError(ValueError):
    """A table YAML that cannot be right; the message starts with file and line."""


def error_at(path: Path, data: Mapping, key: str | None, message: str) -> ConfigError:
    """An error at a key of a mapping, or at the mapping itself."""
    return ConfigError(f"{path}:{data.lines.get(key, data.line)}: {message}")


class Mapping(dict):
    """A YAML mapping that remembers its line and those of its keys."""

    line = 1

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[str, int] = {}


class _Loader(yaml.SafeLoader):
    """Safe YAML with line numbers; decimals stay as printed, a key given twice is an error.

    Numbers are decimal ones: `1:30`, `010` and `0x1F` are words. There are no aliases.
    """

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        """A node, unless it repeats another one or lies too deep."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _Mistake(problem="a table has no aliases (*)", problem_mark=event.start_mark)
        self.depth += 1
        if self.depth > DEEPEST:
            raise _Mistake(problem="nested too deep", problem_mark=event.start_mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def mapping(self, node: yaml.MappingNode) -> Mapping:
        mapping = Mapping()
        mapping.line = node.start_mark.line + 1
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _Mistake(problem="a key must be a word", problem_mark=key_node.start_mark)
            if key in mapping:
                problem = f"'{key}' is there twice"
                raise _Mistake(problem=problem, problem_mark=key_node.start_mark)
            mapping[key] = self.construct_object(value_node, deep=True)
            mapping.lines[key] = key_node.start_mark.line + 1
        return mapping

    def decimal(self, node: yaml.ScalarNode) -> Decimal:
        try:
            number = Decimal(node.value)
        except InvalidOperation:
            number = Decimal("NaN")
        if not number.is_finite():
            problem = f"'{node.value}' is no number"
            raise _Mistake(problem=problem, problem_mark=node.start_mark)
        return number


_Mistake = yaml.MarkedYAMLError
_NUMBERS = {
    "tag:yaml.org,2002:int": re.compile(r"[-+]?(0|[1-9][0-9]*)$"),
    "tag:yaml.org,2002:float": re.compile(
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?$|[-+]?[0-9]+[eE][-+]?[0-9]+$"
        r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
    ),
}
_REPLACED = {*_NUMBERS, "tag:yaml.org,2002:timestamp"}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, _pattern, list("-+.0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.mapping)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.decimal)


def read_yaml(path: Path) -> Mapping:
    """The mapping a file holds.

    Raises:
        ConfigError: if the file cannot be read, is no YAML, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        data = yaml.load(text, _Loader)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: a table is text in UTF-8 ({error})") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: {error.problem}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{path}:{line}: a character that YAML does not allow") from error
    except (ValueError, OverflowError) as error:  # `!!int word`, a number of a million digits
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path}:1: a table is a mapping of keys to values")
    return data


def plain(value: Any) -> Any:
    """An argument as a pruner wants it: floats for the decimals of a YAML."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    return float(value) if isinstance(value, Decimal) else value
