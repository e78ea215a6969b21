"""How long an evaluation should take: from what was measured, else from the paper's times."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from eval.benchmarks.records import BENCHMARKS
from eval.plan.table import Row
from eval.results.shelf import Shelf, State
from eval.run.progress import duration
from eval.run.timing import WARMUP

ANSWER_TOKENS = 4  # these benchmarks ask for a word, a number or a letter


def plan(shelf: Shelf, timing_n: int) -> str:
    """The units with their states, and the hours they should take."""
    states = {unit.path: shelf.state(unit) for unit in shelf.units}
    pace = _Pace(shelf, states)
    lines, left = [], 0.0
    for number, unit in enumerate(shelf.units, 1):
        state, requests = states[unit.path], 0
        documents = BENCHMARKS[unit.task].documents
        if not state.answered:
            requests += documents(unit.limit)
        if timing_n and not state.timed:
            requests += documents(min(timing_n, unit.limit or timing_n)) + WARMUP
        needed = requests * pace.seconds(unit.row)
        left += needed
        shown = duration(needed) if pace.known else f"{requests} requests"
        lines.append(f"{number:4} {unit.row.id:18} {unit.task:22} {state.kind:8} {shown}")
    hours = f"{left / 3600:.1f} hours on one device" if pace.known else "hours unknown"
    lines.append(f"{len(shelf.units)} units, {hours} ({pace.source})")
    return "\n".join(lines)


class _Pace:
    """Seconds per request of a row: its own, its neighbours', or the paper's."""

    def __init__(self, shelf: Shelf, states: Mapping[Path, State]) -> None:
        table = shelf.table
        self.measured: dict[str, list[float]] = {}
        for unit in shelf.units:
            result = states[unit.path].result
            if result is not None and result.requests:
                pace = result.seconds / result.requests
                self.measured.setdefault(unit.row.id, []).append(pace)
        self.paces = [pace for row in self.measured.values() for pace in row]
        self.unpruned = _printed(table.unpruned) if table.unpruned else None
        self.known = bool(self.paces) or self.unpruned is not None
        self.source = (
            f"at the pace of {len(self.paces)} finished units"
            if self.paces
            else f"at the paper's times on an {table.device}, batch 1"
            if self.known
            else "the table prints no times and no unit is finished"
        )

    def seconds(self, row: Row) -> float:
        found = self.measured.get(row.id) or self.paces
        if found:
            return sum(found) / len(found)
        return _printed(row) or self.unpruned or 0.0


def _printed(row: Row) -> float | None:
    """TTFT and a short answer at the printed speed."""
    if not {"ttft_ms", "throughput"} <= row.printed.keys():
        return None
    return float(row.printed["ttft_ms"]) / 1000 + ANSWER_TOKENS / float(row.printed["throughput"])
