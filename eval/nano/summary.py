"""What the three tables say in a few lines: the mean of the eight benchmarks, with intervals.

Every benchmark is put on 0 to 100 first: MME, a sum over categories, is divided by what all right
answers would give. The benchmarks are independent samples, so variances of scores add up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from eval.benchmarks.records import BENCHMARKS
from eval.plan.table import Row, Table
from eval.results import stats
from eval.results.shelf import Shelf

_Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Estimate:
    """A mean of benchmarks in percent, and half its 95 % interval."""

    value: float
    half: float

    def __str__(self) -> str:
        return f"{self.value:.1f} ± {self.half:.1f}"


@dataclass(frozen=True)
class Difference(Estimate):
    """A paired difference in points, with its two-sided p-value."""

    @property
    def p_value(self) -> float:
        if not self.half:
            return 1.0 if not self.value else 0.0
        return 2 * NormalDist().cdf(-abs(self.value) * _Z / self.half)

    def __str__(self) -> str:
        p = "p < 0.0001" if self.p_value < 1e-4 else f"p = {self.p_value:.2g}"
        return f"{self.value:+.1f} ± {self.half:.1f} points ({p})"


Scored = dict[str, stats.Groups]  # by task


def scored(shelf: Shelf, row: Row) -> Scored | None:
    """The stored samples of a row, or None while a task is missing."""
    found: Scored = {}
    for task in shelf.tasks:
        samples = shelf.samples(shelf.unit(row, task))
        if not samples:
            return None
        found[task] = stats.group(BENCHMARKS[task], samples)
    return found


def mean(row: Scored) -> Estimate:
    """Mean of the benchmarks, each in percent."""
    return Estimate(*_combine([_sums(t, groups, groups.y) for t, groups in row.items()]))


def difference(row: Scored, other: Scored) -> Difference:
    """Mean of the benchmarks of one row minus another's, on the same documents."""
    if any(row[task].keys != other[task].keys for task in row):
        raise ValueError("the two rows were asked about different documents")
    return Difference(*_combine([_sums(t, a, a.y - other[t].y) for t, a in row.items()]))


def in_percent(task: str, groups: stats.Groups) -> float:
    """One benchmark's score on 0 to 100."""
    return _sums(task, groups, groups.y)[0]


def _sums(task: str, groups: stats.Groups, y: np.ndarray) -> tuple[float, float]:
    """A benchmark's score from `y` on 0 to 100, and the variance between its groups."""
    right = float(groups.weights @ (BENCHMARKS[task].most * groups.n))
    total, variance = 0.0, 0.0
    for stratum in np.unique(groups.strata):
        at = groups.strata == stratum
        weight, own, n = groups.weights[at], y[at], groups.n[at]
        total += float(weight @ own)
        if at.sum() > 1:
            spread = weight * (own - n * own.sum() / n.sum())
            variance += at.sum() / (at.sum() - 1) * float(spread @ spread)
    return 100 * total / right, 1e4 * variance / right**2


def _combine(parts: list[tuple[float, float]]) -> tuple[float, float]:
    values, variances = zip(*parts, strict=True)
    return sum(values) / len(values), _Z * math.sqrt(sum(variances)) / len(values)


def report(shelf: Shelf, blind: Shelf) -> tuple[str, list[str]]:
    """Markdown of what the demo found, and the three lines that matter."""
    table = shelf.table
    rows = {row.id: scored(shelf, row) for row in table.rows}
    whole = {name: found for name, found in rows.items() if found}
    full = whole.get("full")
    if full is None:
        raise ValueError(f"{shelf.out}: the unpruned row is not complete; run the demo again")
    unseen = scored(blind, table.unpruned)
    text = [*_benchmarks(full, unseen), "", *_means(table, whole), "", *_losses(table, whole)]
    return "\n".join(text), _headlines(shelf, whole, unseen)


def _benchmarks(full: Scored, unseen: Scored | None) -> list[str]:
    """Every benchmark beside what the same model scores when the pictures are hidden."""
    lines = ["| benchmark (0 to 100) | unpruned | blind |", "|---|---:|---:|"]
    for task, groups in full.items():
        hidden = f"{in_percent(task, unseen[task]):.1f}" if unseen else "-"
        lines.append(f"| {BENCHMARKS[task].title} | {in_percent(task, groups):.1f} | {hidden} |")
    hidden = f"{mean(unseen)}" if unseen else "-"
    return [*lines, f"| **mean of {len(full)}** | **{mean(full)}** | {hidden} |"]


def _means(table: Table, whole: dict[str, Scored]) -> list[str]:
    """Mean of the benchmarks per row, and HIVTP's lead over it in its block."""
    lines = [
        "| r_max % | method | mean of the benchmarks | HIVTP minus it |",
        "|---:|---|---:|---:|",
    ]
    for row in table.rows:
        if row.id in whole:
            rival = whole.get(f"hivtp-{row.block}")
            lead = "" if not rival or row.pruner in ("none", "hivtp") else None
            if lead is None:
                lead = str(difference(rival, whole[row.id]))
            lines.append(f"| {row.block} | {row.pruner} | {mean(whole[row.id])} | {lead} |")
    return lines


def _losses(table: Table, whole: dict[str, Scored]) -> list[str]:
    """Where another method of the same budget is ahead of HIVTP."""
    lines = []
    for row in table.rows:
        ours = whole.get(f"hivtp-{row.block}")
        if not ours or row.id not in whole or row.pruner in ("none", "hivtp"):
            continue
        lead = difference(whole[row.id], ours)
        if lead.value > 0:
            lines.append(f"- at {row.block} %: {row.pruner} is ahead of HIVTP by {lead}")
    return ["Where HIVTP loses:", "", *(lines or ["- nowhere in this run"])]


def _headlines(shelf: Shelf, whole: dict[str, Scored], unseen: Scored | None) -> list[str]:
    full = whole["full"]
    blind = f" (blind {mean(unseen)})" if unseen else ""
    lines = [f"unpruned: {mean(full)} of 100, mean of {len(full)} benchmarks{blind}"]
    least = min(row.block for row in shelf.rows)
    ours, chance = whole.get(f"hivtp-{least}"), whole.get(f"random-{least}")
    if ours and chance:
        lines.append(
            f"{least} % of the tokens: HIVTP {mean(ours)}, a random choice {mean(chance)}: "
            f"{difference(ours, chance)}"
        )
    times = [_ttft(shelf, name) for name in ("full", f"hivtp-{least}")]
    if all(times):
        lines.append(f"first token: {times[0]:.1f} ms unpruned, {times[1]:.1f} ms at {least} %")
    return lines


def _ttft(shelf: Shelf, name: str) -> float | None:
    """Mean over the timed tasks of a row."""
    (row,) = (row for row in shelf.rows if row.id == name)
    found = [shelf.timing(shelf.unit(row, task)) for task in shelf.tasks]
    times = [timing.ttft_ms for timing in found if timing]
    return sum(times) / len(times) if times else None
