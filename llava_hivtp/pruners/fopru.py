"""FoPru: keep what the penultimate layer attends to, by patch or by row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llava_hivtp.importance import received_attention
from llava_hivtp.pruners.base import PaperLayers, ScorePruner, best, finite, keep_indices, share
from llava_hivtp.vision import KeptTokens, VisionFeatures, grid_side

STRATEGIES = ("rank", "row")


@dataclass
class FoPru(ScorePruner):
    """Focal pruning by attention received in the encoder (arXiv 2411.14164).

    `rank` keeps the floor(keep * N) best patches of a tile, `row` its floor(keep * n) best rows
    whole. The authors released no code. That CLS's query counts is how HIVTP describes the score;
    focal pruning in github.com/dongxianzhe/hydrainfer (hydrainfer/layer/token_prunning.py) knows no
    CLS: `cls_row=False`. It takes attention received or paid, whichever varies more over the
    patches; here it is always the received.
    """

    layers: tuple[int, ...] = PaperLayers((23,))
    strategy: str = "rank"  # or "row"
    cls_row: bool = True  # whether the attention that CLS pays counts

    by_tile: ClassVar[bool] = True
    chooses_inside: ClassVar[bool] = True

    def validate(self) -> None:
        """Also that the strategy is known."""
        super().validate()
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {STRATEGIES}, got {self.strategy!r}")

    def score(self, features: VisionFeatures) -> Tensor:
        """Mean attention received, (T, N); under `row` that of the patch's whole row."""
        scores = received_attention(features, self.layers, self.cls_row)
        if self.strategy == "rank":
            return scores
        rows = scores.unflatten(1, features.sides)
        return rows.mean(2, keepdim=True).expand_as(rows).flatten(1)

    def select(self, features: VisionFeatures) -> KeptTokens:
        """Keep the best patches or rows of every tile; ties go to the lowest index."""
        count = self.budget_on(features.sides)
        return keep_indices(features, best(finite(self.score(features)), count))

    def budget(self, n_tiles: int, n_patches: int) -> int:
        """floor(keep * N) in every tile, or floor(keep * n) rows of n patches."""
        if self.strategy == "rank":
            return super().budget(n_tiles, n_patches)
        return n_tiles * self.budget_on((grid_side(n_patches),) * 2)

    def budget_on(self, grid: tuple[int, int]) -> int:
        """The same on a grid of (rows, columns)."""
        rows, columns = grid
        if self.strategy == "rank":
            return share(self.keep, rows * columns)
        return share(self.keep, rows) * columns
