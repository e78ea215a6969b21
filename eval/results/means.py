"""Means over the benchmarks of a row, with intervals; each benchmark weighs the same.

Every benchmark is put on 0 to 100 first: MME, a sum over categories, is divided by what all right
answers would give. The benchmarks are independent samples, so variances of scores add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import NormalDist

from eval.results import stats
from eval.results.stats import Groups, Interval

QUANTILE = NormalDist().inv_cdf((1 + stats.LEVEL) / 2)

Scored = Mapping[str, Groups]  # of one row, by task


@dataclass(frozen=True)
class Mean:
    """A mean over benchmarks, and its 95 % interval where there is one."""

    value: float
    interval: Interval | None

    def __str__(self) -> str:
        return f"{self.value:.1f}{shown(self.interval, 1)}"


@dataclass(frozen=True)
class Difference:
    """Mean difference of two rows in points, half its 95 % interval, its two-sided p-value."""

    value: float
    half: float

    @property
    def p_value(self) -> float:
        """Of no difference, by the normal distribution."""
        if not self.half:
            return 1.0 if not self.value else 0.0
        return 2 * NormalDist().cdf(-abs(self.value) * QUANTILE / self.half)

    def said(self, p_value: float) -> str:
        """In words, with its own p-value or a corrected one."""
        p = "p < 0.0001" if p_value < 1e-4 else f"p = {p_value:.2g}"
        return f"{self.value:+.1f} ± {self.half:.1f} points ({p})"


def shown(interval: Interval | None, digits: int) -> str:
    """An interval behind its number: ` [81.2, 86.0]`, nothing where there is none."""
    return f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]" if interval else ""


def in_percent(groups: Groups) -> float:
    """One benchmark's score on 0 to 100."""
    return 100 * stats.score(groups) / groups.top


def mean(row: Scored) -> Mean:
    """Mean of the benchmarks, each in percent; the interval is Wilson's, see `stats`."""
    value = _mean(in_percent(groups) for groups in row.values())
    spread = _spread(row, lambda task, groups: (groups.y, 100 / groups.top))
    return Mean(value, stats.wilson(value, spread, 100, QUANTILE) if spread else None)


def relative(row: Scored, unpruned: Scored) -> Mean | None:
    """Mean of the scores in percent of the unpruned row's, as this field quotes it.

    The interval (delta method, questions paired) is of the ratio. None where the two were asked
    about different documents, or the unpruned row scored nothing.
    """
    if not _same_documents(row, unpruned) or not all(map(stats.score, unpruned.values())):
        return None
    ratios = {task: stats.score(row[task]) / stats.score(unpruned[task]) for task in row}

    def residual(task: str, groups: Groups) -> tuple[object, float]:
        return groups.y - ratios[task] * unpruned[task].y, 100 / stats.score(unpruned[task])

    value, spread = 100 * _mean(ratios.values()), _spread(row, residual)
    half = QUANTILE * math.sqrt(spread) if spread else None
    return Mean(value, None if half is None else (max(0.0, value - half), value + half))


def difference(row: Scored, other: Scored) -> Difference:
    """Mean of the benchmarks of one row minus another's, on the same documents.

    Raises:
        ValueError: if the two were asked about different documents.
    """
    if not _same_documents(row, other):
        raise ValueError("the two rows were asked about different documents")
    value = _mean(in_percent(row[task]) - in_percent(other[task]) for task in row)
    spread = _spread(row, lambda task, groups: (groups.y - other[task].y, 100 / groups.top))
    return Difference(value, QUANTILE * math.sqrt(spread or 0.0))


def _spread(row: Scored, of: Callable[[str, Groups], tuple[object, float]]) -> float | None:
    """Variance of a mean over benchmarks; `of` gives the sum's y and its scale for each."""
    parts = []
    for task, groups in row.items():
        y, scale = of(task, groups)
        found = stats.variance(groups, y)
        if found is None:
            return None
        parts.append(found * scale**2)
    return sum(parts) / len(parts) ** 2


def _same_documents(row: Scored, other: Scored) -> bool:
    return row.keys() == other.keys() and all(row[t].keys == other[t].keys for t in row)


def _mean(numbers: Iterable[float]) -> float:
    found = list(numbers)
    return sum(found) / len(found)
