"""Uncertainty of a score and paired tests between two rows, from stored samples.

Questions about one image stand or fall together, so the unit of resampling is the sample's
`group`, not the document. Every benchmark here is a sum over strata of a ratio of group sums:

    score = 100 * sum over strata of (sum over groups of y) / (sum over groups of n)

One stratum, y = sum of scores, n = number of documents: a plain mean. MME: a stratum per category,
a group per image, y = share right + (1 if all right), n = 1. MMBench: y = 1 if every rotation of a
question is right, n = 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MME_COGNITION = frozenset(
    {"commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"}
)
LEVEL = 0.95
RESAMPLES = 9999
SEED = 0

Samples = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Groups:
    """The samples of a task, summed by group."""

    keys: tuple[tuple[str, str], ...]  # (stratum, group)
    y: np.ndarray  # (G,)
    n: np.ndarray  # (G,)

    @property
    def strata(self) -> np.ndarray:
        """(G,) number of each group's stratum."""
        return np.unique([stratum for stratum, _ in self.keys], return_inverse=True)[1]

    @property
    def weights(self) -> np.ndarray:
        """(G,) what one unit of y adds to the score."""
        return 100 / np.bincount(self.strata, self.n)[self.strata]


@dataclass(frozen=True)
class Paired:
    """A row against the unpruned row, over the same documents."""

    difference: float  # in points of the benchmark
    p_value: float  # two-sided, of no difference
    same_answers: float  # share of equal answers


def group(task: str, samples: Samples) -> Groups:
    """Sum samples by their `group` (and `stratum`, MME's category); perception only for MME."""
    scores: dict[tuple[str, str], list[float]] = {}
    for sample in samples:
        stratum = str(sample.get("stratum", ""))
        if task != "mme" or stratum not in MME_COGNITION:
            scores.setdefault((stratum, str(sample["group"])), []).append(float(sample["score"]))
    keys = tuple(sorted(scores))
    y, n = zip(*(_value(task, scores[key]) for key in keys), strict=True) if keys else ((), ())
    return Groups(keys, np.array(y, dtype=float), np.array(n, dtype=float))


def score(groups: Groups) -> float:
    """The benchmark's score, on the paper's scale."""
    return float(groups.weights @ groups.y)


def half_width(groups: Groups) -> float | None:
    """Half a 95 % confidence interval, cluster-robust (t quantile); None if groups are too few."""
    from scipy.stats import t  # a second to import: not for every command

    strata, count = groups.strata, np.bincount(groups.strata)
    freedom = len(groups.y) - len(count)
    if freedom < 1 or count.min() < 2:
        return None
    means = np.bincount(strata, groups.y) / np.bincount(strata, groups.n)
    residuals = groups.weights * (groups.y - groups.n * means[strata])
    variance = (count / (count - 1) * np.bincount(strata, residuals**2)).sum()
    return float(t.ppf((1 + LEVEL) / 2, freedom) * np.sqrt(variance))


def compare(task: str, samples: Samples, unpruned: Samples) -> Paired | None:
    """Paired test by group and share of equal answers; None if the documents differ.

    McNemar's exact test where every group is one right or wrong answer, else a sign-flip
    permutation test on the groups' differences (exact for few, 9999 seeded draws for many).
    """
    answers = {sample["doc_id"]: sample["answer"].strip() for sample in samples}
    others = {sample["doc_id"]: sample["answer"].strip() for sample in unpruned}
    a, b = group(task, samples), group(task, unpruned)
    if answers.keys() != others.keys() or a.keys != b.keys or not answers:
        return None
    changes = a.weights * (a.y - b.y)
    same = sum(answers[doc] == others[doc] for doc in answers) / len(answers)
    return Paired(float(changes.sum()), _p_value(a, b, changes), same)


def _value(task: str, scores: list[float]) -> tuple[float, float]:
    """(y, n) of one group."""
    if task == "mme":
        return sum(scores) / len(scores) + all(score == 1 for score in scores), 1
    if task.startswith("mmbench"):
        return float(min(scores)), 1
    return sum(scores), len(scores)


def _p_value(a: Groups, b: Groups, changes: np.ndarray) -> float:
    from scipy.stats import binomtest, permutation_test

    changes = changes[changes != 0]
    if not len(changes):
        return 1.0
    one_answer_each = (a.n == 1).all() and set(np.concatenate([a.y, b.y])) <= {0, 1}
    if one_answer_each and len(set(a.strata)) == 1:
        better = int((changes > 0).sum())
        return float(binomtest(better, len(changes), 0.5).pvalue)
    test = permutation_test(
        (changes,),
        np.sum,
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=1000,
        rng=np.random.default_rng(SEED),
    )
    return float(test.pvalue)
