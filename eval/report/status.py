"""How far an evaluation has come: done, stale and why, running, begun, failed and why, missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from eval.benchmarks.records import BENCHMARKS
from eval.results.shelf import KINDS, Shelf, State

UNTIMED = "untimed"  # in place of `done`


def report(shelf: Shelf, stops: Iterable[str] = ()) -> str:
    """Counts, a grid of rows and tasks, and the reason for whatever is not done."""
    states = {unit.path: shelf.state(unit) for unit in shelf.units}
    counts = Counter(state.kind for state in states.values())
    timed = sum(state.timed for state in states.values())
    summary = ", ".join(f"{counts[kind]} {kind}" for kind in KINDS)
    return "\n".join(
        [
            f"{shelf.table.title} ({shelf.table.model}): {len(shelf.units)} units, {summary}; "
            f"{timed} timed",
            "",
            *_grid(shelf, states),
            *_stale(states.values()),
            *_reasons(shelf, states, "Failed", "failed"),
            *_reasons(shelf, states, "Damaged", "damaged"),
            *(["", "Would stop a run:", *stops] if stops else []),
        ]
    )


def _grid(shelf: Shelf, states: Mapping[Path, State]) -> list[str]:
    """One line per row; rows that say the same thing show the same units."""
    lines = [["", *(BENCHMARKS[task].title for task in shelf.tasks)]]
    for row in shelf.rows:
        found = [states[shelf.unit(row, task).path] for task in shelf.tasks]
        lines.append([row.id, *map(_word, found)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


def _word(state: State) -> str:
    if state.kind == "done" and not state.timed:
        return UNTIMED
    return "-" if state.kind == "missing" else state.kind


def _stale(states: Iterable[State]) -> list[str]:
    changes = Counter(state.reason for state in states if state.kind == "stale")
    lines = [f"{change}: {count} units" for change, count in changes.items()]
    return ["", "Stale, to be run again:", *lines] if lines else []


def _reasons(shelf: Shelf, states: Mapping[Path, State], title: str, kind: str) -> list[str]:
    lines = [
        f"{unit.row.id}, {unit.task}: {states[unit.path].reason}"
        for unit in shelf.units
        if states[unit.path].kind == kind
    ]
    return ["", f"{title}:", *lines] if lines else []
