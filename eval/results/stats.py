"""Uncertainty of a score and paired tests between two rows, from stored samples.

Questions about one image stand or fall together, so the unit of resampling is the sample's
`group`, not the document. Every benchmark here is a sum over strata of a ratio of group sums:

    score = 100 * sum over strata of (sum over groups of y) / (sum over groups of n)

One stratum, y = sum of scores, n = number of documents: a plain mean. What y and n are of another
benchmark its record says (`tally` in `eval/benchmarks/records.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np

from eval.benchmarks.record import Benchmark
from eval.results.records import Sample

LEVEL = 0.95
RESAMPLES = 9999
EXACT = 12  # changes up to which all signs are tried
SEED = 0


@dataclass(frozen=True)
class Groups:
    """The samples of a task, summed by group."""

    keys: tuple[tuple[str, str], ...]  # (stratum, group)
    y: np.ndarray  # (G,)
    n: np.ndarray  # (G,)
    answers: Mapping[Any, str]  # by document, all that were asked
    most: float = 1.0  # the largest y / n

    @cached_property
    def strata(self) -> np.ndarray:
        """(G,) number of each group's stratum."""
        return np.unique([stratum for stratum, _ in self.keys], return_inverse=True)[1]

    @cached_property
    def weights(self) -> np.ndarray:
        """(G,) what one unit of y adds to the score."""
        return 100 / np.bincount(self.strata, self.n)[self.strata]

    @property
    def top(self) -> float:
        """The score if everything were right."""
        return float(self.weights @ (self.most * self.n))


Interval = tuple[float, float]


@dataclass(frozen=True)
class Paired:
    """A row against another, over the same documents."""

    difference: float  # in points of the benchmark
    p_value: float  # two-sided, of no difference
    same_answers: float  # share of equal answers
    corrected: float | None = None  # the p-value after `holm` over all that is shown beside it


def group(benchmark: Benchmark, samples: Sequence[Sample]) -> Groups:
    """Sum a benchmark's samples by their `group` (and `stratum`, if they have one)."""
    found: dict[tuple[str, str], list[float]] = {}
    for sample in samples:
        if sample.stratum not in benchmark.uncounted:
            key = sample.stratum, str(sample.group)
            found.setdefault(key, []).append(sample.score)
    keys = tuple(sorted(found))
    y, n = np.array([benchmark.tally(found[key]) for key in keys], dtype=float).reshape(-1, 2).T
    answers = {sample.doc_id: sample.answer.strip() for sample in samples}
    return Groups(keys, y, n, answers, benchmark.most)


def score(groups: Groups) -> float:
    """The benchmark's score, on the paper's scale."""
    return float(groups.weights @ groups.y)


def variance(groups: Groups, y: np.ndarray | None = None) -> float | None:
    """Of the score, or of another sum `weights @ y`: cluster-robust; None for too few groups."""
    y = groups.y if y is None else y
    strata, count = groups.strata, np.bincount(groups.strata)
    if not _freedom(groups) or count.min() < 2:
        return None
    means = np.bincount(strata, y) / np.bincount(strata, groups.n)
    residuals = groups.weights * (y - groups.n * means[strata])
    return float((count / (count - 1) * np.bincount(strata, residuals**2)).sum())


def interval(groups: Groups) -> Interval | None:
    """A 95 % confidence interval of the score, inside its scale.

    None where groups are too few or all alike: no spread says nothing about the error.
    """
    from scipy.stats import t  # a second to import: not for every command

    spread = variance(groups)
    if not spread:
        return None
    quantile = float(t.ppf((1 + LEVEL) / 2, _freedom(groups)))
    return wilson(score(groups), spread, groups.top, quantile)


def wilson(value: float, spread: float, top: float, quantile: float) -> Interval | None:
    """Wilson's interval of a score from 0 to `top` with this variance.

    For clustered questions the number of them is the one that would give the variance if each
    stood alone, p (1 - p) / variance (Korn and Graubard 1998).
    """
    share = value / top
    if not 0 < share < 1 or spread <= 0:
        return None
    asked = share * (1 - share) / (spread / top**2)
    shrunk = 1 + quantile**2 / asked
    middle = (share + quantile**2 / (2 * asked)) / shrunk
    half = quantile / shrunk * np.sqrt(share * (1 - share) / asked + (quantile / asked / 2) ** 2)
    return float(top * (middle - half)), float(top * (middle + half))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction (1979): below 0.05 none is found by chance in 95 of 100 such families."""
    order = np.argsort(p_values, kind="stable")
    steps = np.array(p_values, dtype=float)[order] * np.arange(len(order), 0, -1)
    corrected = np.minimum(np.maximum.accumulate(steps), 1.0)
    return corrected[np.argsort(order, kind="stable")].tolist()


def compare(row: Groups, other: Groups) -> Paired | None:
    """Paired test by group and share of equal answers; None if the documents differ.

    McNemar's exact test where every group is one right or wrong answer, else a sign-flip
    permutation test on the groups' differences (exact for few, 9999 seeded draws for many).
    """
    same_documents = row.keys == other.keys and row.answers.keys() == other.answers.keys()
    if not same_documents or not row.answers:
        return None
    changes = row.weights * (row.y - other.y)
    same = sum(answer == other.answers[doc] for doc, answer in row.answers.items())
    return Paired(float(changes.sum()), _p_value(row, other, changes), same / len(row.answers))


def _freedom(groups: Groups) -> int:
    """Groups beyond one for each stratum."""
    return len(groups.y) - len(set(groups.strata))


def _p_value(a: Groups, b: Groups, changes: np.ndarray) -> float:
    from scipy.stats import binomtest

    changes = changes[changes != 0]
    if not len(changes):
        return 1.0
    one_answer_each = (a.n == 1).all() and set(np.concatenate([a.y, b.y])) <= {0, 1}
    if one_answer_each and len(set(a.strata)) == 1:
        return float(binomtest(int((changes > 0).sum()), len(changes), 0.5).pvalue)
    return _sign_flip(changes)


def _sign_flip(changes: np.ndarray) -> float:
    """Share of random signs that give a sum as far from 0; all signs where they are few."""
    if len(changes) <= EXACT:
        sums = np.array(list(product((-1, 1), repeat=len(changes)))) @ changes
        return float(_as_far(sums, changes).mean())
    # equal sizes together: the sum of m random signs is 2 Binomial(m, 1/2) - m
    sizes, counts = np.unique(np.abs(changes).round(9), return_counts=True)
    draw = np.random.default_rng(SEED).binomial
    sums = sum(
        size * (2 * draw(count, 0.5, RESAMPLES) - count)
        for size, count in zip(sizes, counts, strict=True)
    )
    return float((1 + _as_far(sums, changes).sum()) / (1 + RESAMPLES))


def _as_far(sums: np.ndarray, changes: np.ndarray) -> np.ndarray:
    return np.abs(sums) >= abs(changes.sum()) - 1e-6
