"""YAML that knows its lines: every mistake in a table is an error with file and line."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import yaml


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
    """Safe YAML with line numbers; decimals stay as printed, a key given twice is an error."""

    def mapping(self, node: yaml.MappingNode) -> Mapping:
        mapping = Mapping()
        mapping.line = node.start_mark.line + 1
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in mapping:
                raise yaml.MarkedYAMLError(
                    problem=f"'{key}' is there twice", problem_mark=key_node.start_mark
                )
            mapping[key] = self.construct_object(value_node, deep=True)
            mapping.lines[key] = key_node.start_mark.line + 1
        return mapping

    def decimal(self, node: yaml.ScalarNode) -> Decimal:
        try:
            return Decimal(node.value)
        except InvalidOperation:
            raise yaml.MarkedYAMLError(
                problem=f"'{node.value}' is no number", problem_mark=node.start_mark
            ) from None


_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.mapping)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.decimal)


def read_yaml(path: Path) -> Mapping:
    """The mapping a file holds.

    Raises:
        ConfigError: if the file cannot be read, is no YAML, or holds something else.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: {error.problem}") from error
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path}:1: a table is a mapping of keys to values")
    return data


def plain(value: Any) -> Any:
    """An argument as a pruner wants it: floats for the decimals of a YAML."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    return float(value) if isinstance(value, Decimal) else value
