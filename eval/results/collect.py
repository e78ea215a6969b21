"""What was measured for the rows of a table, read back from the stored files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from eval.benchmarks.records import BENCHMARKS
from eval.plan.reader import ConfigError
from eval.plan.table import PREPARATION, TIMES, Row, Table
from eval.plan.tower import misfit_here
from eval.plan.units import Unit
from eval.results import times
from eval.results.agree import agreed, text_of
from eval.results.compare import Measured, compare_rows, mark_best_times
from eval.results.records import Result, Timing
from eval.results.shelf import Shelf

DIGITS = {
    "retain": 1,
    "tokens": 0,
    "entering": 0,
    "newlines": 0,
    "relative": 1,
    "ttft_ms": 1,
    PREPARATION: 1,
}  # two otherwise

CHECKPOINT = ("checkpoint", "checkpoint digest")  # in a protocol

T = TypeVar("T")
ByTask = dict[str, Result]  # of one row
TimesByTask = dict[str, Timing]


@dataclass(frozen=True)
class Collected:
    """All that a table shows, and what must be said below it."""

    table: Table
    limit: int | None
    against: Row | None  # what every other row is paired with
    rows: tuple[Measured, ...]
    protocol: dict[str, str]
    provenance: dict[str, list[str]]
    timing_device: str | None
    notes: tuple[str, ...]

    @property
    def on_printed_model(self) -> bool:
        """Whether the printed numbers may be about this checkpoint (by its last name)."""
        return Path(self.table.model).name in {Path(model).name for model in self.table.models}

    @property
    def on_printed_device(self) -> bool:
        """Whether our times come from the device of the printed ones."""
        return bool(self.table.device) and self.table.device in (self.timing_device or "")

    @property
    def printed_on(self) -> dict[str, str]:
        """Columns whose printed numbers are of another split, and which: they are not ours."""
        found = {BENCHMARKS[t].column: BENCHMARKS[t].printed_on for t in self.table.tasks}
        return {column: split for column, split in found.items() if split}

    def printed_relative(self, row: Row) -> float | None:
        """What the paper's cells give as % of unpruned, where it prints every benchmark."""
        columns = [BENCHMARKS[task].column for task in self.table.tasks]
        full = self.table.unpruned
        if full is None or self.printed_on or not {*columns} <= row.printed.keys() & full.printed:
            return None
        shares = [float(row.printed[c]) / float(full.printed[c]) for c in columns]
        return 100 * sum(shares) / len(shares)

    def delta(self, measured: Measured, column: str) -> float | None:
        """Ours minus the paper's; None where the two are not the same thing."""
        ours, printed = measured.values.get(column), measured.row.printed.get(column)
        if ours is None or printed is None or column in measured.partial:
            return None
        if self.limit is not None or not self.on_printed_model:
            return None
        if column in self.printed_on or (column in TIMES and not self.on_printed_device):
            return None
        return round(ours, DIGITS.get(column, 2)) - float(printed)


def collect(
    table: Table,
    rows: Sequence[Row],
    out: Path,
    limit: int | None = None,
    device: str | None = None,
    tests: bool = True,
    stale: bool = False,
    against: Row | None = None,
) -> Collected:
    """Read the results of these rows; `MixedResults` if their protocols differ.

    Every row is paired with `against`, by default the unpruned row. Without `tests` the samples
    stay unread: no intervals, no comparisons, no means over benchmarks. Results of another
    checkpoint or other code than those here count with `stale` only.

    Raises:
        ConfigError: if the checkpoint is here and the table's `patches` are not its own.
    """
    if wrong := misfit_here(table):
        raise ConfigError(wrong)
    shelf = Shelf(table, out, rows, limit=limit, stale=stale)
    results = {row.id: _by_task(shelf, row, shelf.result) for row in rows}
    timings = {row.id: _by_task(shelf, row, shelf.timing) for row in rows}
    protocol = _agreed("accuracy", results, rows)
    for name, value in _agreed("timing", timings, rows).items():
        if protocol.get(name) != value:
            protocol[f"timing {name}"] = value
    provenance = _provenance([*_records(results), *_records(timings)])
    timings, timing_device, notes = _one_device(timings, device)
    measured = {row.id: _measure(table, row, results[row.id], timings[row.id]) for row in rows}
    against = against or table.unpruned
    found = tuple(measured.values())
    notes += compare_rows(shelf, found, against) if tests else []
    mark_best_times(found)
    notes += times.notes(timings)
    notes += [*_stale_notes(shelf), *_short_notes(results.values()), *_tuned_notes(rows)]
    return Collected(
        table, limit, against, found, protocol, provenance, timing_device, tuple(notes)
    )


def _by_task(shelf: Shelf, row: Row, ask: Callable[[Unit], T | None]) -> dict[str, T]:
    """What counts of a row, by task."""
    found = {task: ask(shelf.unit(row, task)) for task in shelf.tasks}
    return {task: record for task, record in found.items() if record is not None}


def _stale_notes(shelf: Shelf) -> list[str]:
    """What must be said of results that no longer belong to the checkpoint or the code."""
    said = "shown all the same" if shelf.stale else "left out, --stale shows them"
    return [
        f"STALE ({said}): {change}: {count} results and times; `run` measures them again."
        for change, count in shelf.changes().items()
    ]


def _measure(table: Table, row: Row, results: ByTask, timings: TimesByTask) -> Measured:
    """Scores by task; counts and times as means over the requests of a task, then of the tasks."""
    measured = Measured(row)
    for task, result in results.items():
        if result.score is not None:
            benchmark = BENCHMARKS[task]
            shown = benchmark.shown(result.score, result.requests)
            measured.values[benchmark.column] = shown
    tokens = [result.tokens for result in results.values()]
    # Of the mean layer; that is all that enter, unless some are dropped inside.
    read = [t.patches if t.mean_per_layer is None else t.mean_per_layer for t in tokens]
    means = {"tokens": _mean(read), "newlines": _mean([t.newlines for t in tokens]) or None}
    if any(t.mean_per_layer is not None for t in tokens):
        means["entering"] = _mean([t.patches for t in tokens])
    if total := sum(t.total for t in tokens):
        means["retain"] = 100 * sum(read) / total
    for column, mean in means.items():
        _add_mean(measured, column, mean, len(results), len(table.tasks))
    for column in (*TIMES, PREPARATION):
        known = [found for t in timings.values() if (found := getattr(t, column)) is not None]
        _add_mean(measured, column, _mean(known), len(known), len(table.tasks))
    for column in TIMES:
        if around := times.interval(column, list(timings.values())):
            measured.intervals[column] = around
    return measured


def _add_mean(measured: Measured, column: str, mean: float | None, tasks: int, of: int) -> None:
    if mean is None:
        return
    measured.values[column] = mean
    if tasks < of:
        measured.partial[column] = tasks


def _short_notes(rows: Iterable[ByTask]) -> list[str]:
    """Which scores are over fewer questions than the benchmark divides by."""
    asked = {(task, result.requests) for tasks in rows for task, result in tasks.items()}
    return [
        f"{BENCHMARKS[task].title} asked {count} questions here: percent of these, not points of "
        f"{BENCHMARKS[task].over}."
        for task, count in sorted(asked)
        if BENCHMARKS[task].over not in (None, count)
    ]


def _one_device(
    timings: dict[str, TimesByTask], wanted: str | None
) -> tuple[dict[str, TimesByTask], str | None, list[str]]:
    """Times of one device; of none, with a note, while there are several to choose from."""
    names = sorted({_device(timing) for timing in _records(timings)})
    names = [name for name in names if wanted is None or wanted in name]
    if len(names) == 1:
        kept = {
            row: {task: timing for task, timing in tasks.items() if _device(timing) == names[0]}
            for row, tasks in timings.items()
        }
        return kept, names[0], []
    notes = [f"Times were taken on {'; '.join(names)}: choose with --device."] if names else []
    return {row: {} for row in timings}, None, notes


def _provenance(records: Iterable[Result | Timing]) -> dict[str, list[str]]:
    """Every commit, device, version and day behind the numbers."""
    found: dict[str, set[str]] = {}
    for record in records:
        versions = record.provenance.get("versions", {})
        entries = {**record.provenance, **{f"{name} version": v for name, v in versions.items()}}
        entries.pop("versions", None)
        for name, value in entries.items():
            text = text_of(value)
            found.setdefault(name, set()).add(text[:10] if name == "date" else text)
    return {name: sorted(values) for name, values in sorted(found.items())}


def _agreed(
    kind: str, found: Mapping[str, Mapping[str, Result | Timing]], rows: Sequence[Row]
) -> dict[str, str]:
    """What the rows agree in; tuned ones in all but the checkpoint."""
    tuned = {row.id for row in rows if row.checkpoint}
    protocols = _protocols(found)
    rest = {
        row: {task: _without(each, CHECKPOINT) for task, each in tasks.items()}
        for row, tasks in protocols.items()
    }
    own = {row: tasks for row, tasks in protocols.items() if row not in tuned}
    return agreed(kind, rest) | agreed(kind, own)


def _without(protocol: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: value for name, value in protocol.items() if name not in names}


def _tuned_notes(rows: Sequence[Row]) -> list[str]:
    return [
        f"TUNED, not training-free: {row.id} is the checkpoint {row.checkpoint}, trained under its "
        "method."
        for row in rows
        if row.checkpoint
    ]


def _protocols(found: Mapping[str, Mapping[str, Result | Timing]]) -> dict[str, dict[str, Any]]:
    return {
        row: {task: record.protocol for task, record in tasks.items()}
        for row, tasks in found.items()
    }


def _records(found: Mapping[str, Mapping[str, T]]) -> list[T]:
    return [record for tasks in found.values() for record in tasks.values()]


def _device(timing: Timing) -> str:
    return str(timing.provenance.get("device", "an unnamed device"))


def _mean(numbers: Sequence[float]) -> float | None:
    return sum(numbers) / len(numbers) if numbers else None
