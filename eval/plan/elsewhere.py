"""What other papers print for a table's methods: a CSV with the source of every number."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

from eval.plan.reader import ConfigError

COLUMNS = ("paper", "table", "model", "benchmark", "differs", "method", "tokens", "value", "source")


@dataclass(frozen=True)
class Printed:
    """One number of a paper."""

    paper: str
    table: str
    model: str  # the checkpoint's last name
    benchmark: str  # a column of ours, or a benchmark that no task here is
    differs: str  # in what it is another measure than ours, as `F1`; "" where it is the same
    method: str  # its name here
    tokens: int  # of an image, in the paper's count
    value: Decimal
    source: str  # where it was read


def read_elsewhere(path: Path) -> tuple[Printed, ...]:
    """All numbers of a file, in its order.

    Raises:
        ConfigError: with the line, if there is no such file or a line is no number with a source.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = csv.DictReader(file)
            if tuple(lines.fieldnames or ()) != COLUMNS:
                raise ConfigError(f"{path}:1: the columns must be {','.join(COLUMNS)}")
            return tuple(_read(path, lines.line_num, line) for line in lines)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error


def _read(path: Path, number: int, line: dict[str, str]) -> Printed:
    try:
        if None in line or not all(line[name] for name in COLUMNS if name != "differs"):
            raise ValueError("a field is missing, or there is one too many")
        value = Decimal(line["value"])
        if not value.is_finite():
            raise ValueError(f"{line['value']} is no number")
        return Printed(**line | {"tokens": int(line["tokens"]), "value": value})
    except (ValueError, InvalidOperation) as error:
        raise ConfigError(f"{path}:{number}: {error or line['value']}") from error
