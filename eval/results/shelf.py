"""The stored results of a table's rows, and how far each unit is: asked by all that reads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eval.digests import checkpoint_digest
from eval.plan.table import Row, Table
from eval.plan.units import Unit, unit_of, units
from eval.results import records, sources, store
from eval.results.records import RecordError, Result, Sample, Timing

KINDS = ("done", "stale", "running", "begun", "failed", "damaged", "missing")
PARTS = ("score", "samples", "times")


@dataclass(frozen=True)
class State:
    """One unit, as found by one look at its files."""

    kind: str  # one of KINDS; done: score and samples are there and current
    parts: frozenset[str] = frozenset()  # those of PARTS that are there and current
    reason: str = ""  # why it is stale, failed or damaged
    result: Result | None = None  # stale ones, too
    timing: Timing | None = None
    changes: tuple[str, ...] = ()  # what makes its result and its times stale

    @property
    def answered(self) -> bool:
        """Whether the accuracy pass is done."""
        return {"score", "samples"} <= self.parts

    @property
    def timed(self) -> bool:
        """Whether the timing pass is done."""
        return "times" in self.parts


class Shelf:
    """Knows table, rows, tasks, folder and limit; what lies in it and whether it counts."""

    def __init__(
        self,
        table: Table,
        out: str | Path,
        rows: Iterable[Row] | None = None,
        tasks: Iterable[str] | None = None,
        limit: int | None = None,
        stale: bool = False,
    ) -> None:
        """Read no result yet; `stale` ones are handed out with this switch only."""
        self.table, self.out, self.limit, self.stale = table, Path(out), limit, stale
        self.rows = tuple(table.rows if rows is None else rows)
        self.tasks = tuple(table.tasks if tasks is None else tasks)
        self.units = units(table, out, self.rows, self.tasks, limit)
        self.code = sources.Code()
        self._digests: dict[str, str | None] = {}
        self._found: dict[Path, State] = {}

    @property
    def checkpoint(self) -> str | None:
        """Digest of the table's checkpoint; None if it is not here, and so not compared."""
        return self._digest(self.table.model)

    def _digest(self, model: str) -> str | None:
        if model not in self._digests:
            try:
                self._digests[model] = checkpoint_digest(model)
            except (FileNotFoundError, ImportError):
                self._digests[model] = None
        return self._digests[model]

    def unit(self, row: Row, task: str) -> Unit:
        """The unit of a row and a task."""
        return unit_of(self.table, self.out, row, task, self.limit)

    def by_checkpoint(self) -> list[Shelf]:
        """The same units on a shelf for each checkpoint, which is then its table's."""
        shelves = []
        for model in dict.fromkeys(unit.model for unit in self.units):
            rows = [row for row in self.rows if (row.checkpoint or self.table.model) == model]
            table = replace(self.table, model=model)
            shelf = Shelf(table, self.out, rows, self.tasks, self.limit, self.stale)
            shelf.units = [unit for unit in self.units if unit.model == model]
            shelves.append(shelf)
        return shelves

    def state(self, unit: Unit) -> State:
        """How far a unit is now."""
        self._found[unit.path] = found = self._look(unit)
        return found

    def result(self, unit: Unit) -> Result | None:
        """The result of a unit, if there is one that counts.

        Raises:
            RecordError: if its files are damaged.
        """
        state = self._whole(unit)
        return state.result if self.stale or "score" in state.parts else None

    def timing(self, unit: Unit) -> Timing | None:
        """The times of a unit, likewise."""
        state = self._whole(unit)
        return state.timing if self.stale or state.timed else None

    def samples(self, unit: Unit) -> list[Sample] | None:
        """The samples of a unit's result that counts; None if either is missing."""
        result = self.result(unit)
        return records.read_samples(unit.path, result) if result else None

    def changes(self) -> Counter[str]:
        """What made results and times stale that were looked at, and how many of them."""
        return Counter(change for state in self._found.values() for change in state.changes)

    def _whole(self, unit: Unit) -> State:
        state = self._found.get(unit.path) or self.state(unit)
        if state.kind == "damaged":
            raise RecordError(state.reason)
        return state

    def _look(self, unit: Unit) -> State:
        path = unit.path
        try:
            result, timing = records.read_result(path), records.read_timing(path)
            of = result.unit.get("task", unit.task) if result else unit.task
            if of != unit.task:
                raise RecordError(f"{path} is about {of}: remove it")
            whole = result is not None and records.has_samples(path, result)
        except RecordError as error:
            return State("running" if store.held(path) else "damaged", reason=str(error))
        old, old_times = self._change(unit.row, result), self._change(unit.row, timing)
        parts = {
            "score": result is not None and not old,
            "samples": whole and not old,
            "times": timing is not None and not old_times,
        }
        there = frozenset(part for part, is_there in parts.items() if is_there)
        kind, reason = _kind(path, there, old)
        return State(kind, there, reason, result, timing, tuple(filter(None, (old, old_times))))

    def _change(self, row: Row, record: Result | Timing | None) -> str | None:
        """What is another thing than when a record of a row was stored, if any."""
        if record is None:
            return None
        if row.absent:
            return row.absent
        change = self.code.changed(row, record.source)
        here = self._digest(row.checkpoint or self.table.model)
        if change is None and here not in (None, _checkpoint(record.protocol)):
            return "the checkpoint changed"
        return change


def _kind(path: Path, parts: frozenset[str], change: str | None) -> tuple[str, str]:
    """One of KINDS, and its reason."""
    answered = {"score", "samples"} <= parts
    if parts != frozenset(PARTS):
        if store.held(path):
            return "running", ""
        failure = records.read_failure(path)
        if failure is not None:
            return "failed", failure.error
    if answered:
        return "done", ""
    if change:
        return "stale", change
    if "score" in parts or store.beside(path, "journal.jsonl").exists():
        return "begun", ""
    return "missing", ""


def _checkpoint(protocol: dict[str, Any]) -> str | None:
    return protocol.get("checkpoint digest")
