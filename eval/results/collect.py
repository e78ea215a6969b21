"""What was measured for the rows of a table, read back from the stored files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from eval.benchmarks.record import Benchmark
from eval.benchmarks.records import BENCHMARKS
from eval.plan.table import TIMES, Row, Table
from eval.plan.units import Unit
from eval.results import stats
from eval.results.agree import agreed, text_of
from eval.results.records import Result, Timing
from eval.results.shelf import Shelf

DIGITS = {"retain": 1, "tokens": 0, "newlines": 0, "ttft_ms": 1}  # two otherwise

T = TypeVar("T")
ByTask = dict[str, Result]  # of one row
TimesByTask = dict[str, Timing]


@dataclass
class Measured:
    """The stored numbers of one row, by column."""

    row: Row
    values: dict[str, float] = field(default_factory=dict)
    half_widths: dict[str, float] = field(default_factory=dict)  # half of a 95 % interval
    paired: dict[str, stats.Paired] = field(default_factory=dict)  # against the unpruned row
    partial: dict[str, int] = field(default_factory=dict)  # a mean over this many tasks, not all


@dataclass(frozen=True)
class Collected:
    """All that a table shows, and what must be said below it."""

    table: Table
    limit: int | None
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
) -> Collected:
    """Read the results of these rows; `MixedResults` if their protocols differ.

    Without `tests` the samples stay unread: no intervals, no comparison with the unpruned row.
    Results of another checkpoint or other code than those here count with `stale` only.
    """
    shelf = Shelf(table, out, rows, limit=limit, stale=stale)
    results = {row.id: _by_task(shelf, row, shelf.result) for row in rows}
    timings = {row.id: _by_task(shelf, row, shelf.timing) for row in rows}
    protocol = agreed("accuracy", _protocols(results))
    for name, value in agreed("timing", _protocols(timings)).items():
        if protocol.get(name) != value:
            protocol[f"timing {name}"] = value
    provenance = _provenance([*_records(results), *_records(timings)])
    timings, timing_device, notes = _one_device(timings, device)
    measured = {row.id: _measure(table, row, results[row.id], timings[row.id]) for row in rows}
    if tests:
        for task in table.tasks:
            notes += _test(shelf, task, list(measured.values()))
    notes += [*_stale_notes(shelf), *_short_notes(results.values())]
    return Collected(
        table, limit, tuple(measured.values()), protocol, provenance, timing_device, tuple(notes)
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
    patches, newlines, total = (
        [getattr(result.tokens, name) for result in results.values()]
        for name in ("patches", "newlines", "total")
    )
    means = {"tokens": _mean(patches), "newlines": _mean(newlines) or None}
    if patches and sum(total):
        means["retain"] = 100 * sum(patches) / sum(total)
    for column, mean in means.items():
        _add_mean(measured, column, mean, len(results), len(table.tasks))
    for column in TIMES:
        mean = _mean([getattr(timing, column) for timing in timings.values()])
        _add_mean(measured, column, mean, len(timings), len(table.tasks))
    return measured


def _add_mean(measured: Measured, column: str, mean: float | None, tasks: int, of: int) -> None:
    if mean is None:
        return
    measured.values[column] = mean
    if tasks < of:
        measured.partial[column] = tasks


def _test(shelf: Shelf, task: str, rows: Sequence[Measured]) -> list[str]:
    """Add intervals and paired tests from the samples of one task; returns what was amiss."""
    unpruned = _groups(shelf, shelf.table.unpruned, task)
    notes = []
    for measured in rows:
        if BENCHMARKS[task].column in measured.values:
            groups = _groups(shelf, measured.row, task)
            note = _test_row(measured, task, groups, unpruned)
            notes += [f"{measured.row.id}, {task}: {note}."] if note else []
            notes += _strata_note(BENCHMARKS[task], groups) if groups else []
    return list(dict.fromkeys(notes))


def _test_row(
    measured: Measured, task: str, groups: stats.Groups | None, unpruned: stats.Groups | None
) -> str | None:
    column = BENCHMARKS[task].column
    if groups is None:
        return "no samples are stored, so no interval and no test"
    score = measured.values[column]
    if abs(stats.score(groups) - score) > 0.01:
        return (
            f"the samples add up to {stats.score(groups):.2f}, the score is {score:.2f}, "
            "so no interval and no test"
        )
    width = stats.half_width(groups)
    if width is not None:
        measured.half_widths[column] = width
    if unpruned is None or measured.row.pruner == "none":
        return None
    paired = stats.compare(groups, unpruned)
    if paired is None:
        return "other documents than the unpruned row's, so no test"
    measured.paired[column] = paired
    return None


def _strata_note(benchmark: Benchmark, groups: stats.Groups) -> list[str]:
    """That the score is not on the scale of the official set, for lack of categories."""
    found, each = len(set(groups.strata)), 100 * benchmark.most
    if found == benchmark.strata:
        return []
    return [
        f"{benchmark.title} has {found} categories here, so at most {each * found:g} points, not "
        f"{each * benchmark.strata:g}: not the scale of the official set."
    ]


def _short_notes(rows: Iterable[ByTask]) -> list[str]:
    """Which scores are over fewer questions than the benchmark divides by."""
    asked = {(task, result.requests) for tasks in rows for task, result in tasks.items()}
    return [
        f"{BENCHMARKS[task].title} asked {count} questions here: percent of these, not points of "
        f"{BENCHMARKS[task].over}."
        for task, count in sorted(asked)
        if BENCHMARKS[task].over not in (None, count)
    ]


def _groups(shelf: Shelf, row: Row | None, task: str) -> stats.Groups | None:
    samples = shelf.samples(shelf.unit(row, task)) if row else None
    return stats.group(BENCHMARKS[task], samples) if samples else None


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
