"""Ways to serve a request: stock LLaVA, nothing pruned, and every method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from eval.plan.table import Row
from llava_hivtp.pruners import Pruner, build_pruner


@dataclass(frozen=True)
class Case:
    """One way to serve a request; without a pruner it is stock LLaVA, unattached."""

    name: str
    pruner: Pruner | None
    layout: str = "unpad"
    block: int = 100  # r_max in percent

    @property
    def label(self) -> str:
        """Name, and the layout where it matters."""
        return self.name if self.layout == "unpad" else f"{self.name}, {self.layout}"

    @property
    def is_hivtp(self) -> bool:
        """Whether it is the method that all others are compared with."""
        return self.pruner is not None and bool(self.pruner.stage_names)


def bases(layouts: Sequence[str]) -> list[Case]:
    """What every method is compared with: stock LLaVA, and nothing pruned on our own path."""
    return [Case("stock", None), *(Case("none", build_pruner("none"), each) for each in layouts)]


def table_cases(rows: Iterable[Row], layouts: Sequence[str]) -> list[Case]:
    """The rows of a table, each under every layout."""
    return [
        Case(row.id, row.build(), layout, row.block)
        for layout in layouts
        for row in rows
        if row.pruner != "none"
    ]


def spelled_cases(
    pruners: Mapping[str, Pruner], layouts: Sequence[str], n_patches: int, depth: int
) -> list[Case]:
    """Methods by their spelling, each under every layout.

    Their block is what the mean of the language model's `depth` layers reads of a tile of
    `n_patches`.
    """
    blocks = {
        spelled: round(
            100 * fmean(method.per_layer(method.budget(1, n_patches), depth)) / n_patches
        )
        for spelled, method in pruners.items()
    }
    return [
        Case(spelled, pruner, layout, blocks[spelled])
        for spelled, pruner in pruners.items()
        for layout in layouts
    ]


def that_differ(cases: Sequence[Case], tiles: int) -> list[Case]:
    """One tile has no layout: leave its repetitions out."""
    if tiles > 1:
        return list(cases)
    first = {case.name: replace(case, layout="unpad") for case in reversed(cases)}
    return list(first.values())[::-1]
