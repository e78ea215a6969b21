"""How long an evaluation should take: from what was measured, else from the paper's times."""

from __future__ import annotations

from collections.abc import Sequence

from eval import store
from eval.data import documents
from eval.progress import duration
from eval.rows import Row, Table, Unit
from eval.timing import WARMUP

ANSWER_TOKENS = 4  # these benchmarks ask for a word, a number or a letter


def plan(table: Table, units: Sequence[Unit], timing_n: int) -> str:
    """The units with their states, and the hours they should take."""
    seconds = _Seconds(table, units)
    lines, left = [], 0.0
    for number, unit in enumerate(units, 1):
        state = store.state(unit.path)
        needed = 0.0 if state == "done" else seconds.accuracy(unit)
        if timing_n and store.read_timing(unit.path) is None:
            needed += seconds.times(unit, timing_n)
        left += needed
        lines.append(f"{number:4} {unit.row.id:18} {unit.task:22} {state:8} {duration(needed)}")
    lines.append(f"{len(units)} units, {left / 3600:.1f} hours on one device ({seconds.source})")
    return "\n".join(lines)


class _Seconds:
    """Seconds per request of a row: its own, its neighbours', or the paper's."""

    def __init__(self, table: Table, units: Sequence[Unit]) -> None:
        self.table, self.measured = table, {}
        for unit in units:
            result = store.read_result(unit.path)
            if result is not None and result["requests"]:
                pace = result["seconds"] / result["requests"]
                self.measured.setdefault(unit.row.id, []).append(pace)
        paces = [pace for row in self.measured.values() for pace in row]
        self.mean = sum(paces) / len(paces) if paces else None
        self.source = (
            f"at the pace of {len(paces)} finished units"
            if paces
            else f"at the paper's times on an {table.device or 'unnamed device'}, batch 1"
        )

    def accuracy(self, unit: Unit) -> float:
        return documents(unit.task, unit.limit) * self._pace(unit.row)

    def times(self, unit: Unit, count: int) -> float:
        return (documents(unit.task, min(count, unit.limit or count)) + WARMUP) * self._pace(
            unit.row
        )

    def _pace(self, row: Row) -> float:
        own = self.measured.get(row.id)
        if own:
            return sum(own) / len(own)
        return self.mean if self.mean is not None else self._printed(row)

    def _printed(self, row: Row) -> float:
        """TTFT and a short answer at the printed speed; the unpruned row's where none is given."""
        for printed in (row.printed, self.table.unpruned.printed if self.table.unpruned else {}):
            if {"ttft_ms", "throughput"} <= printed.keys():
                return float(printed["ttft_ms"]) / 1000 + ANSWER_TOKENS / float(
                    printed["throughput"]
                )
        return 0.0
