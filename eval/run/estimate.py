"""How long an evaluation should take: from what was measured, else from the paper's times."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from eval.benchmarks.records import BENCHMARKS
from eval.plan.table import Row
from eval.plan.units import Unit
from eval.results.shelf import Shelf, State
from eval.run.progress import duration
from eval.run.timing import WARMUP

ANSWER_TOKENS = 4  # these benchmarks ask for a word, a number or a letter


def plan(shelf: Shelf, timing_n: int, measured: Mapping[str, float] | None = None) -> str:
    """The units with their states, and the hours they should take.

    Args:
        shelf: the units, and what is stored of them.
        timing_n: requests timed per unit.
        measured: seconds per request by row, if they were measured here: `calibrate`.
    """
    states = {unit.path: shelf.state(unit) for unit in shelf.units}
    paces = _paces(shelf, states, measured)
    lines = []
    for number, unit in enumerate(shelf.units, 1):
        state = states[unit.path]
        requests = _requests(unit, state, timing_n)
        shown = duration(requests * paces[0].seconds(unit.row)) if paces else f"{requests} requests"
        lines.append(f"{number:4} {unit.row.id:18} {unit.task:22} {state.kind:8} {shown}")
    return "\n".join([*lines, *summary(shelf, states, timing_n, measured)])


def summary(
    shelf: Shelf,
    states: Mapping[Path, State],
    timing_n: int,
    measured: Mapping[str, float] | None = None,
) -> list[str]:
    """What is left of the units with these states: rows, units, hours, and how to run fewer."""
    left = [(u.row, _requests(u, states[u.path], timing_n)) for u in shelf.units]
    hours = "; ".join(
        f"{sum(count * pace.seconds(row) for row, count in left) / 3600:.1f} hours on one "
        f"device ({pace.source})"
        for pace in _paces(shelf, states, measured)
    )
    hours = hours or "hours unknown (the table prints no times and no unit is finished)"
    rows = len({unit.row.id for unit in shelf.units})
    return [f"{rows} rows, {len(shelf.units)} units, {hours}", *_fewer(shelf)]


def _fewer(shelf: Shelf) -> list[str]:
    """How to run the paper's rows alone, where there are others."""
    sets = [row.set for row in shelf.rows]
    if "paper" not in sets or len(set(sets)) == 1:
        return []
    return [f"--rows paper (ROWS=paper) runs the {sets.count('paper')} rows of the paper alone"]


def _requests(unit: Unit, state: State, timing_n: int) -> int:
    """How many are left to answer and to time."""
    documents, count = BENCHMARKS[unit.task].documents, 0
    if not state.answered:
        count += documents(unit.limit)
    if timing_n and not state.timed:
        count += documents(min(timing_n, unit.limit or timing_n)) + WARMUP
    return count


@dataclass(frozen=True)
class _Pace:
    """Seconds per request, and where they come from."""

    seconds: Callable[[Row], float]
    source: str


def _paces(
    shelf: Shelf, states: Mapping[Path, State], measured: Mapping[str, float] | None
) -> list[_Pace]:
    """The best one first, then that of the paper if it prints one."""
    paces, finished = [], {}
    for unit in shelf.units:
        result = states[unit.path].result
        if result is not None and result.requests:
            finished.setdefault(unit.row.id, []).append(result.seconds / result.requests)
    if measured:
        paces.append(_Pace(lambda row: measured[row.id], "at the pace measured here just now"))
    elif finished:
        every = [pace for row in finished.values() for pace in row]
        paces.append(
            _Pace(
                lambda row: mean(finished.get(row.id, every)),
                f"at the pace of {len(every)} finished units",
            )
        )
    unpruned = _printed(shelf.table.unpruned) if shelf.table.unpruned else None
    if unpruned is not None and (measured or not finished):
        source = f"at the paper's times on an {shelf.table.device}, batch 1"
        paces.append(_Pace(lambda row: _printed(row) or unpruned, source))
    return paces


def _printed(row: Row) -> float | None:
    """TTFT and a short answer at the printed speed."""
    if not {"ttft_ms", "throughput"} <= row.printed.keys():
        return None
    return float(row.printed["ttft_ms"]) / 1000 + ANSWER_TOKENS / float(row.printed["throughput"])
