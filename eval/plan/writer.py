"""A row written into a table's file, checked as it would be read."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from eval.plan.reader import ConfigError
from eval.plan.table import load_table


def as_line(entry: Mapping[str, Any]) -> str:
    """A row as one line of YAML."""
    text = yaml.safe_dump(dict(entry), default_flow_style=True, sort_keys=False, width=10**6)
    return f"- {text.strip()}"


def add_row(path: Path, entry: Mapping[str, Any]) -> bool:
    """Add a row behind the last one of a table; whether it was not there yet.

    Raises:
        ValueError: if another row has its id, or if its rows are not what ends the file.
    """
    text, line = path.read_text(), as_line(entry)
    if any(one.strip() == line for one in text.splitlines()):
        return False
    if any(row.id == entry["id"] for row in load_table(path).rows):
        raise ValueError(f"{path} has another row '{entry['id']}': remove it, or write {line}")
    indents = re.findall(r"^( *)- ", text, re.MULTILINE)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(f"{text.rstrip()}\n{indents[-1] if indents else ''}{line}\n")
        if load_table(temporary).rows[-1].id != entry["id"]:
            raise ConfigError("the last row is another one")
        os.replace(temporary, path)
    except ConfigError as error:
        raise ValueError(
            f"{path} does not end with its rows, so none can be added ({error}); paste it: {line}"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return True
