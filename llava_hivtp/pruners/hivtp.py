"""HIVTP: the best of each region, then the best leftover of each window."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from llava_hivtp.importance import received_attention
from llava_hivtp.pruners.base import (
    PaperLayers,
    Pruner,
    best,
    finite,
    keep_indices,
    keep_inside,
    keep_mask,
)
from llava_hivtp.vision import KeptTokens, VisionFeatures, grid_side


@dataclass
class HIVTP(Pruner):
    """Hierarchical pruning by middle-layer attention (arXiv 2509.23663, Algorithms 1 and 2).

    The paper's text says layers 7-10, its released code slices 7-9; the default follows the
    paper. That code stores r, k and c but does not read them: it keeps int(0.25 * area) tokens of
    each of 2 x 2 regions, and has windows of 2 x 2, whatever it is given.

    On a grid of (rows, columns) the patch in row y and column x lies in region
    (floor(y r / rows), floor(x r / columns)), of which floor(k/100 * area) stay, and in window
    (floor(y / c), floor(x / c)): those at the right and lower edge may be smaller. Where r and c
    divide the sides of a square this is the same.

    How many tokens stay depends on the image, unless `fill` tops every tile up to p_max.
    """

    r: int = 2  # regions per side
    k: float = 25  # percent of each region kept by the global stage
    c: int | None = 2  # window side of the local stage, in patches; None: no local stage
    layers: tuple[int, ...] = PaperLayers((7, 8, 9, 10))
    fill: bool = False  # top up to exactly p_max with the next best tokens: static shapes

    stage_names: ClassVar[tuple[str, ...]] = ("global stage", "local stage")
    by_tile: ClassVar[bool] = True
    chooses_inside: ClassVar[bool] = True

    def validate(self) -> None:
        """Also that r and c are whole numbers, and k a percentage."""
        for name, value in (("r", self.r), ("c", self.c)):
            if name == "c" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number from 1, got {value!r}")
        if isinstance(self.k, bool) or not isinstance(self.k, (int, float)):
            raise ValueError(f"k must be a percentage in (0, 100], got {self.k!r}")
        if not 0 < self.k <= 100:
            raise ValueError(f"k must be a percentage in (0, 100], got {self.k}")
        super().validate()

    def select(self, features: VisionFeatures) -> KeptTokens:
        """Algorithm 2 on every tile; survivors in raster order.

        A GPU is waited for once, and not at all with `fill`: then NaN is left for others to find.
        """
        grid = features.grid
        most = self.budget_on(grid) if grid else self.budget(1, features.n_patches)
        scores = received_attention(features, self.layers)
        stages = self.stages(scores, grid)
        if self.fill:
            return keep_indices(features, best(scores.masked_fill(stages > 0, torch.inf), most))
        scores, stages = torch.stack([scores, stages.float()]).cpu()  # the one wait
        finite(scores)
        return keep_mask(features, stages > 0)

    def select_inside(self, features: VisionFeatures, inside: Tensor) -> KeptTokens:
        """Algorithm 2 with nothing but the image's patches to choose from."""
        shown = inside.to(features.tokens.device)
        scores = received_attention(features, self.layers).masked_fill(~shown, -torch.inf)
        chosen = (self.stages(scores) > 0) & shown
        if not self.fill:
            return keep_mask(features, chosen)
        most = self.budget(1, features.n_patches)
        return keep_inside(features, scores.masked_fill(chosen, torch.inf), inside, most)

    def stages(self, scores: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Stage that keeps each patch of (T, N) scores: 1 global, 2 local, 0 none.

        Ties go to the lowest index. Without a grid of (rows, columns) it is a square.
        """
        if grid is not None:
            return self._stages_on(scores, grid)
        regions = _split(scores, self.r)
        top = best(regions, self._per_region(regions.shape[2]))
        stages = _join(torch.zeros_like(regions, dtype=torch.uint8).scatter_(2, top, 1))
        if self.c is None:
            return stages
        windows = _split(stages, grid_side(scores.shape[1]) // self.c)
        left = _split(scores, grid_side(scores.shape[1]) // self.c)
        left = left.masked_fill(windows > 0, -torch.inf)
        # A window that the global stage kept whole has nothing left: its argmax stays global.
        pick = left.argmax(2, keepdim=True)
        value = torch.where(left.gather(2, pick) > -torch.inf, 2, 1).to(stages.dtype)
        return _join(windows.scatter(2, pick, value))

    def _stages_on(self, scores: Tensor, grid: tuple[int, int]) -> Tensor:
        """`stages` on any grid: regions and windows may be uneven."""
        (rows, columns), c = grid, self.c
        y, x = torch.arange(rows)[:, None], torch.arange(columns)
        region = (y * self.r // rows * self.r + x * self.r // columns).flatten()
        quota = torch.tensor([self._per_region(area) for area in region.bincount().tolist()])
        most = quota[region].to(scores.device)
        stages = (_ranks_within(scores, region) < most).byte()
        if c is None:
            return stages
        window = (y // c * -(-columns // c) + x // c).flatten()
        left = scores.masked_fill(stages > 0, -torch.inf)
        return stages.masked_fill((_ranks_within(left, window) == 0) & (stages == 0), 2)

    def budget(self, n_tiles: int, n_patches: int) -> int:
        """T * p_max, p_max = r^2 * floor(k/100 * (n/r)^2) + (n/c)^2, at most all N."""
        n = grid_side(n_patches)
        for name, value in (("r", self.r), ("c", self.c)):
            if value is not None and n % value:
                fits = [d for d in range(1, n + 1) if n % d == 0]
                raise ValueError(
                    f"{name}={value} does not divide the {n} x {n} grid; choose {fits}"
                )
        kept = self.r**2 * self._per_region((n // self.r) ** 2)
        kept += 0 if self.c is None else (n // self.c) ** 2
        if not kept:
            raise ValueError(
                f"r={self.r}, k={self.k}, c=None keeps no token of {n_patches}; raise k or give c"
            )
        return n_tiles * min(kept, n_patches)

    def budget_on(self, grid: tuple[int, int]) -> int:
        """p_max of a grid of (rows, columns): the share of every region, one of every window."""
        rows, columns = grid
        heights, widths = _parts(rows, self.r), _parts(columns, self.r)
        kept = sum(self._per_region(high * wide) for high in heights for wide in widths)
        kept += 0 if self.c is None else -(-rows // self.c) * -(-columns // self.c)
        if not kept:
            raise ValueError(
                f"r={self.r}, k={self.k}, c=None keeps no token of {rows} x {columns}; raise k or "
                "give c"
            )
        return min(kept, rows * columns)

    def varies_by(self) -> str:
        """Only `fill` makes the number known before the image is seen."""
        return "" if self.fill else "fill=False"

    def _per_region(self, area: int) -> int:
        return int(Fraction(str(self.k)) * area / 100)  # floor, as in Table 1: k=15 keeps 21 of 144


def _parts(side: int, r: int) -> list[int]:
    """Rows (or columns) of each of the r regions along a side."""
    starts = [-(-part * side // r) for part in range(r + 1)]
    return [end - start for start, end in zip(starts, starts[1:], strict=False)]


def _ranks_within(scores: Tensor, cell: Tensor) -> Tensor:
    """Rank of each of (T, N) scores among those of its cell, 0 the highest.

    Cells (N,) are on the host. Ties go to the lowest index.
    """
    start = torch.cat([torch.zeros(1, dtype=torch.long), cell.bincount().cumsum(0)[:-1]])
    start, cell = (part.to(scores.device) for part in (start, cell))
    order = scores.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, cell[order].argsort(dim=1, stable=True))  # cell by cell
    ranks = torch.arange(scores.shape[1], device=scores.device) - start[cell[order]]
    return torch.empty_like(order).scatter_(1, order, ranks)


def _split(grid: Tensor, cells: int) -> Tensor:
    """(T, N) in raster order -> (T, cells * cells, patches per cell), raster order in each."""
    tiles, n = grid.shape[0], grid_side(grid.shape[1])
    grid = grid.view(tiles, cells, n // cells, cells, n // cells)
    return grid.transpose(2, 3).reshape(tiles, cells * cells, -1)


def _join(split: Tensor) -> Tensor:
    """Undo `_split`."""
    tiles, cells, side = split.shape[0], grid_side(split.shape[1]), grid_side(split.shape[2])
    return split.view(tiles, cells, cells, side, side).transpose(2, 3).reshape(tiles, -1)
