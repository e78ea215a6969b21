"""Units: one row on one task, and the file its result lies in.

The path is made from the model, the pruner with its arguments, the layout and the task alone, so
that two rows that say the same thing, in one table or in two, are evaluated once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from eval.plan.table import Row, Table


@dataclass(frozen=True)
class Unit:
    """The smallest piece of an evaluation, and the place of its result."""

    model: str
    row: Row
    task: str
    limit: int | None
    path: Path


def unit_path(out: str | Path, model: str, row: Row, task: str, limit: int | None = None) -> Path:
    """The result file: `OUT/<model>/<row's folder>/<task>.json`; a dry run has a name of its own.

    The checkpoint's last name stands for it, on a hub or on a disk: two checkpoints of one name
    need two OUT folders (the digest in the protocol tells them apart).
    """
    name = os.path.basename(os.path.abspath(model)) or "model"  # of `..`, too
    suffix = "" if limit is None else f".limit{limit}"
    return Path(out) / name / row.folder / f"{task}{suffix}.json"


def unit_of(table: Table, out: str | Path, row: Row, task: str, limit: int | None = None) -> Unit:
    """The unit of a row, on its own checkpoint or the table's."""
    model = row.checkpoint or table.model
    return Unit(model, row, task, limit, unit_path(out, model, row, task, limit))


def units(
    table: Table,
    out: str | Path,
    rows: Iterable[Row] | None = None,
    tasks: Iterable[str] | None = None,
    limit: int | None = None,
) -> list[Unit]:
    """All units of a table, row by row, each path once."""
    chosen = tuple(table.tasks if tasks is None else tasks)
    found = {}
    for row in table.rows if rows is None else rows:
        for task in chosen:
            unit = unit_of(table, out, row, task, limit)
            found.setdefault(unit.path, unit)
    return list(found.values())
