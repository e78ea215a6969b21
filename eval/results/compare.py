"""Intervals, pairs of rows and means over benchmarks, from the stored samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from eval.benchmarks.record import Benchmark
from eval.benchmarks.records import BENCHMARKS
from eval.plan.table import TIMES, Row
from eval.results import means, stats
from eval.results.shelf import Shelf
from eval.results.stats import Groups, Interval, Paired

LEVEL = 0.05  # of a difference that is shown as one
MEANS = ("mean", "relative")  # of all benchmarks: on 0 to 100, in percent of the unpruned row


@dataclass
class Measured:
    """The stored numbers of one row, by column."""

    row: Row
    values: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, Interval] = field(default_factory=dict)  # of 95 %
    paired: dict[str, Paired] = field(default_factory=dict)  # against another row
    best: set[str] = field(default_factory=set)  # where it beats all of its section, not by chance
    partial: dict[str, int] = field(default_factory=dict)  # a mean over this many tasks, not all


Scores = dict[str, dict[str, Groups]]  # row -> task -> its samples, summed


def compare_rows(shelf: Shelf, rows: Sequence[Measured], against: Row | None) -> list[str]:
    """Add to every row all that its samples tell; returns what was amiss."""
    needed = {m.row.id: m.row for m in rows}
    needed |= {row.id: row for row in (against, shelf.table.unpruned) if row is not None}
    scores: Scores = {}
    notes: list[str] = []
    for task in shelf.tasks:
        found, said = _read(shelf, task, needed)
        notes += said
        _add_task(BENCHMARKS[task], rows, found, against)
        for name, groups in found.items():  # the means need no answers
            scores.setdefault(name, {})[task] = replace(groups, answers={})
    whole = {name: found for name, found in scores.items() if len(found) == len(shelf.tasks)}
    _add_means(rows, whole, shelf.table.unpruned, against)
    _correct(rows)
    return list(dict.fromkeys(notes))


def mark_best_times(rows: Sequence[Measured]) -> None:
    """Mark times that are better than all others of their section by more than the intervals."""
    for column in TIMES:
        sign = -1 if column == "ttft_ms" else 1

        def clear(best: Measured, other: Measured, column: str = column, sign: int = sign) -> float:
            mine, theirs = best.intervals.get(column), other.intervals.get(column)
            if mine is None or theirs is None:
                return 1.0
            apart = mine[0] > theirs[1] if sign > 0 else mine[1] < theirs[0]
            return 0.0 if apart else 1.0

        _mark_best(rows, column, clear, sign)


def _read(shelf: Shelf, task: str, rows: Mapping[str, Row]) -> tuple[dict[str, Groups], list[str]]:
    """The samples of a task that add up to the score, by row; what is wrong with the others."""
    benchmark = BENCHMARKS[task]
    found, notes = {}, []
    for name, row in rows.items():
        unit = shelf.unit(row, task)
        result = shelf.result(unit)
        if result is None or result.score is None:
            continue
        samples = shelf.samples(unit)
        if not samples:
            notes.append(f"{name}, {task}: no samples are stored, so no interval and no test.")
            continue
        groups = stats.group(benchmark, samples)
        score, sum_of_them = benchmark.shown(result.score, result.requests), stats.score(groups)
        if abs(sum_of_them - score) > 0.01:
            notes.append(
                f"{name}, {task}: the samples add up to {sum_of_them:.2f}, the score is "
                f"{score:.2f}, so no interval and no test."
            )
            continue
        found[name] = groups
        notes += _strata_note(benchmark, groups)
    return found, notes


def _add_task(
    benchmark: Benchmark,
    rows: Sequence[Measured],
    found: Mapping[str, Groups],
    against: Row | None,
) -> None:
    column = benchmark.column
    other = found.get(against.id) if against else None
    for measured in rows:
        groups = found.get(measured.row.id)
        if groups is None:
            continue
        interval = stats.interval(groups)
        if interval is not None:
            measured.intervals[column] = interval
        if other is not None and measured.row.id != against.id:
            paired = stats.compare(groups, other)
            if paired is not None:
                measured.paired[column] = paired

    def p_value(best: Measured, rival: Measured) -> float:
        mine, theirs = found.get(best.row.id), found.get(rival.row.id)
        paired = stats.compare(mine, theirs) if mine and theirs else None
        return paired.p_value if paired else 1.0

    _mark_best(rows, column, p_value)


def _add_means(
    rows: Sequence[Measured], whole: Scores, unpruned: Row | None, against: Row | None
) -> None:
    """Means over all benchmarks, of rows that have all of them."""
    full = whole.get(unpruned.id) if unpruned else None
    other = whole.get(against.id) if against else None
    for measured in (m for m in rows if m.row.id in whole):
        own = whole[measured.row.id]
        found = {"relative": full and means.relative(own, full)}
        if len(own) > 1:
            found["mean"] = means.mean(own)
        for column, mean in found.items():
            if mean:
                measured.values[column] = mean.value
            if mean and mean.interval:
                measured.intervals[column] = mean.interval
        if other and measured.row.id != against.id and len(measured.paired) == len(own) > 1:
            gap = means.difference(own, other)
            same = sum(paired.same_answers for paired in measured.paired.values()) / len(own)
            measured.paired["mean"] = Paired(gap.value, gap.p_value, same)

    def p_value(best: Measured, rival: Measured) -> float:
        mine, theirs = whole.get(best.row.id), whole.get(rival.row.id)
        try:
            return means.difference(mine, theirs).p_value if mine and theirs else 1.0
        except ValueError:
            return 1.0

    _mark_best(rows, "mean", p_value)


def _mark_best(
    rows: Sequence[Measured],
    column: str,
    p_value: Callable[[Measured, Measured], float],
    sign: int = 1,
) -> None:
    """Mark the best row of each section, if it beats every other one at LEVEL after Holm."""
    sections: dict[str, list[Measured]] = {}
    for measured in rows:
        known = column in measured.values and column not in measured.partial
        if known and measured.row.pruner != "none":
            sections.setdefault(measured.row.section, []).append(measured)
    for section in sections.values():
        best = max(section, key=lambda measured: sign * measured.values[column])
        found = [p_value(best, other) for other in section if other is not best]
        if found and max(stats.holm(found)) < LEVEL:
            best.best.add(column)


def _correct(rows: Sequence[Measured]) -> None:
    """Holm's correction over every pair that is shown."""
    cells = [(measured, column) for measured in rows for column in measured.paired]
    corrected = stats.holm([measured.paired[column].p_value for measured, column in cells])
    for (measured, column), p_value in zip(cells, corrected, strict=True):
        measured.paired[column] = replace(measured.paired[column], corrected=p_value)


def _strata_note(benchmark: Benchmark, groups: Groups) -> list[str]:
    """That the score is not on the scale of the official set, for lack of categories."""
    found, each = len(set(groups.strata)), 100 * benchmark.most
    if found == benchmark.strata:
        return []
    return [
        f"{benchmark.title} has {found} categories here, so at most {each * found:g} points, not "
        f"{each * benchmark.strata:g}: not the scale of the official set."
    ]
