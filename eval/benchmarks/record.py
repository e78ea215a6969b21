"""What a benchmark is: all that the evaluation knows about one, in one record."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Document = Mapping[str, Any]  # a row of the data set
Sample = Mapping[str, Any]  # lmms-eval's record of one answer: its `doc`, its metrics by name
Tally = Callable[[Sequence[float]], tuple[float, float]]


@dataclass(frozen=True)
class Part:
    """One configuration and split of a data set."""

    repository: str
    split: str
    config: str | None = None
    documents: int = 0  # questions in it

    @property
    def patterns(self) -> list[str]:
        """Its files in the repository."""
        folders = [f"{self.config}/"] if self.config else ["", "data/"]
        return [f"{folder}{self.split}-*-of-*.parquet" for folder in folders]


def each(scores: Sequence[float]) -> tuple[float, float]:
    """Every document counts: a plain mean over documents."""
    return sum(scores), len(scores)


def all_right(scores: Sequence[float]) -> tuple[float, float]:
    """A group counts once, as right if every document in it is."""
    return min(scores), 1


@dataclass(frozen=True)
class Benchmark:
    """One task of lmms-eval and the column of a table that it fills.

    The score is lmms-eval's own. For intervals and tests it is computed once more from the samples:
    the sum over strata of (sum over groups of y) / (sum over groups of n), times 100, where `tally`
    turns the scores of a group into y and n.
    """

    task: str  # of lmms-eval
    column: str  # key of `printed` and `protocol` in a table's YAML
    title: str
    metric: str  # key in lmms-eval's results[task]
    scale: float  # metric times scale is the number that papers print
    measures: str  # what a `protocol` must say
    data: tuple[Part, ...]  # all that the task reads
    gold: Callable[[Document], str]  # an answer that the task counts as right

    group: Callable[[Document], Any] | None = None  # what shares an image; None: each by itself
    stratum: Callable[[Document], str] | None = None  # None: there is one
    score: Callable[[Sample], float] | None = None  # of a sample, 0 to 1; None: it is the metric
    tally: Tally = each
    strata: int = 1  # of the official set, as far as they count
    uncounted: frozenset[str] = frozenset()  # strata that the score leaves out

    only: tuple[str, Any] | None = None  # (column, value) of the documents to ask, if not all
    together: int = 1  # documents in a row that are scored together: --limit must keep them so
    over: int | None = None  # documents that the metric divides by, however few were asked
    printed_on: str = ""  # what papers print numbers of, where its answers are hidden
    judge: bool = False  # answers that no rule reads are put to a remote model
    stands_alone: bool = False  # asked as question and line for a short answer: figures can draw it

    @property
    def most(self) -> float:
        """What a group that is all right gives: y / n."""
        y, n = self.tally([1.0] * self.together)
        return y / n

    def documents(self, limit: int | None = None) -> int:
        """Requests of the official set, or of the first `limit`."""
        count = sum(part.documents for part in self.data)
        return count if limit is None else min(limit, count)

    def check_run(self, limit: int | None) -> None:
        """Raise a ValueError for a run that cannot score what it asks."""
        if limit is not None and limit % self.together:
            raise ValueError(
                f"{self.title} scores {self.together} questions together: --limit must be a "
                f"multiple of {self.together}, got {limit}"
            )
        if self.judge and not os.environ.get("OPENAI_API_KEY"):
            raise ValueError(
                f"{self.task} asks a remote model about answers that no rule reads, and guesses at "
                "random without one: set OPENAI_API_KEY"
            )

    def scored(self, sample: Sample) -> float:
        """The score of one sample."""
        if self.score is not None:
            return float(self.score(sample))
        found = sample[self.metric.partition(",")[0]]
        return float(found["score"] if isinstance(found, Mapping) else found)

    def grouped(self, sample: Sample) -> str:
        """The group of one sample."""
        group = None if self.group is None else self.group(sample["doc"])
        return str(sample["doc_id"] if group is None else group)

    def shown(self, score: float, asked: int) -> float:
        """A stored score as a table shows it: percent of what was asked, where that is not all."""
        return score if self.over is None else score * self.over / asked
