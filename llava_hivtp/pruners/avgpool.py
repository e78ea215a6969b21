"""Average pooling: the control that blurs instead of choosing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from llava_hivtp.pruners.base import Pruner, check_share, share
from llava_hivtp.vision import KeptTokens, VisionFeatures, grid_side


@dataclass
class AvgPool(Pruner):
    """Replace every tile by the means of an even grid of cells.

    Of K = floor(keep * N) there are floor(sqrt(K)) rows of floor(K / rows) cells, at most n;
    where they do not divide n, neighbouring cells overlap by a patch. A cell's place is its
    middle patch (of two, the later). Every cell stands for N / cells patches.
    """

    keep: float = 1.0  # share of the N patches of a tile, in (0, 1]

    needs_square: ClassVar[bool] = True
    merges: ClassVar[bool] = True

    def validate(self) -> None:
        """Also that `keep` is a share."""
        check_share("keep", self.keep)
        super().validate()

    def select(self, features: VisionFeatures) -> KeptTokens:
        """Means of the cells of every tile, in raster order."""
        n, shape = features.n, self._cells(features.n_patches)
        grid = features.tokens.float().transpose(1, 2).unflatten(2, (n, n))  # (T, D, n, n)
        tokens = adaptive_avg_pool2d(grid, shape).flatten(2).transpose(1, 2).flatten(0, 1)
        rows, columns = (_middles(n, count, grid.device) for count in shape)
        patch = (n * rows[:, None] + columns).flatten()
        tile = torch.arange(features.n_tiles, device=grid.device).repeat_interleave(len(patch))
        place = patch.repeat(features.n_tiles)
        size = torch.full_like(place, features.n_patches / len(patch), dtype=torch.float32)
        return KeptTokens(tokens.to(features.tokens.dtype), tile, place, size=size)

    def budget(self, n_tiles: int, n_patches: int) -> int:
        """As many as there are cells: at most floor(keep * N) in every tile."""
        return n_tiles * math.prod(self._cells(n_patches))

    def _cells(self, n_patches: int) -> tuple[int, int]:
        count = share(self.keep, n_patches)
        rows = math.isqrt(count)
        return rows, min(count // rows, grid_side(n_patches))


def _middles(n: int, count: int, device: torch.device) -> Tensor:
    """The middle of each of `count` cells along a side of n patches."""
    return (2 * torch.arange(count, device=device) + 1) * n // (2 * count)
