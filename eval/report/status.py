"""How far an evaluation has come: done, stale and why, running, failed and why, missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from eval.benchmarks.records import BENCHMARKS
from eval.plan.table import Row, Table
from eval.plan.units import Unit, unit_path, units
from eval.results import store
from eval.results.stale import Present

STATES = ("done", "stale", "running", "failed", "missing")


def report(
    table: Table, rows: Sequence[Row], tasks: Sequence[str], out: Path, limit: int | None = None
) -> str:
    """Counts, a grid of rows and tasks, what changed since, and the reason of every failure."""
    found, present = units(table, out, rows, tasks, limit), Present(table.model)
    changes = {unit.path: _change(present, unit, store.read_result(unit.path)) for unit in found}
    states = {path: _state(path, change) for path, change in changes.items()}
    counts = Counter(states.values())
    times = [(unit, store.read_timing(unit.path)) for unit in found]
    timed = sum(time is not None and not _change(present, unit, time) for unit, time in times)
    summary = ", ".join(f"{counts[state]} {state}" for state in STATES)
    return "\n".join(
        [
            f"{table.title} ({table.model}): {len(found)} units, {summary}; {timed} timed",
            "",
            *_grid(table, rows, tasks, out, limit, states),
            *_stale(change for path, change in changes.items() if states[path] == "stale"),
            *_failures(found),
        ]
    )


def _change(present: Present, unit: Unit, record: dict[str, Any] | None) -> str | None:
    return present.change(unit.row, record) if record else None


def _state(path: Path, change: str | None) -> str:
    if change is None:
        return store.state(path)
    return "running" if store.held(path) else "stale"


def _grid(
    table: Table,
    rows: Sequence[Row],
    tasks: Sequence[str],
    out: Path,
    limit: int | None,
    states: dict[Path, str],
) -> list[str]:
    """One line per row; rows that say the same thing show the same units."""
    lines = [["", *(BENCHMARKS[task].title for task in tasks)]]
    for row in rows:
        paths = [unit_path(out, table.model, row, task, limit) for task in tasks]
        lines.append([row.id, *("-" if states[p] == "missing" else states[p] for p in paths)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


def _stale(changes: Iterable[str | None]) -> list[str]:
    lines = [f"{change} since: {count} units" for change, count in Counter(changes).items()]
    return ["", "Stale, to be run again:", *lines] if lines else []


def _failures(found: Sequence[Unit]) -> list[str]:
    failed = [unit for unit in found if store.beside(unit.path, "failed.json").exists()]
    lines = [f"{unit.row.id}, {unit.task}: {store.failure(unit.path)}" for unit in failed]
    return ["", "Failed:", *lines] if lines else []
