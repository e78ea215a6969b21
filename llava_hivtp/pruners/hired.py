"""HiRED: one budget for all tiles, spent where the base image attracts attention."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from llava_hivtp.importance import cls_attention
from llava_hivtp.pruners.base import (
    PaperLayers,
    ScorePruner,
    best,
    check_layers,
    check_part,
    finite,
    keep_mask,
    share,
)
from llava_hivtp.vision import KeptTokens, VisionFeatures


@dataclass
class HiRED(ScorePruner):
    """High-resolution early dropping (arXiv 2408.10945).

    The base image gets the share alpha of floor(keep * T * N) tokens. The rest goes to the other
    tiles in proportion to how many of the base image's top (1 - alpha) * N patches, by CLS
    attention in the first layer, lie in each. Every tile then keeps its best patches by CLS
    attention in the late layer. A single tile keeps floor(keep * N).

    Where we differ from the released code: it counts patches in strips of whole base-image rows
    even if tiles lie side by side, rounds every tile's share down and drops what exceeds a tile.
    We count in two dimensions, give the remainders to the largest fractions and the overflow to
    the other tiles. `faithful` brings its strips and its rounding back, int(T * N * keep) among it
    (2015 of 2880 at keep=0.7), but never its exchange of height and width. Where no patch is
    counted, as with alpha=1, it fails and we share equally. On LLaVA-NeXT the code unpads after the
    choice, but breaks no rows; no layout here is the same: `unpad` crops alike and adds newlines.
    """

    layers: tuple[int, ...] = PaperLayers((1, 23))  # for the tiles' shares, for the patches
    alpha: float = 0.5  # share of the budget that goes to the base image, in [0, 1]
    faithful: bool = False

    needs_cls: ClassVar[bool] = True

    def validate(self) -> None:
        """Also that alpha is a share, and that there are two layers."""
        check_part("alpha", self.alpha)
        super().validate()
        check_layers(self.layers, 2, "a first and a late layer")

    def score(self, features: VisionFeatures) -> Tensor:
        """Attention of CLS in the late layer, (T, N)."""
        return cls_attention(features, self.layers[1])

    def select(self, features: VisionFeatures) -> KeptTokens:
        """Keep the best patches of every tile within its share; ties go to the lowest index."""
        order = finite(self.score(features)).argsort(descending=True, stable=True)
        counts = torch.tensor(self.counts(features), device=order.device)
        within = torch.arange(features.n_patches, device=order.device) < counts[:, None]
        return keep_mask(features, torch.zeros_like(within).scatter_(1, order, within))

    def budget(self, n_tiles: int, n_patches: int) -> int:
        """floor(keep * T * N), over all tiles together."""
        total = share(self.keep, n_tiles * n_patches)
        return int(n_tiles * n_patches * self.keep) if self.faithful else total

    def varies_by(self) -> str:
        """The released code rounds down and drops what exceeds a tile."""
        return "faithful=True" if self.faithful else ""

    def counts(self, features: VisionFeatures) -> list[int]:
        """How many patches each tile keeps."""
        tiles, patches = features.n_tiles, features.n_patches
        total = self.budget(tiles, patches)
        if tiles == 1:
            return [total]
        masses = self._masses(features)
        if self.faithful:  # floating point, as released
            base = min(int(total * self.alpha), patches)
            rest = min(total - base, (tiles - 1) * patches)
            parts = torch.tensor(masses) / sum(masses) * rest
            return [base, *parts.int().clamp(max=patches).tolist()]
        base = min(int(Fraction(str(self.alpha)) * total), patches)
        base = max(base, total - (tiles - 1) * patches)
        return [base, *_share_out(total - base, masses, patches)]

    def _masses(self, features: VisionFeatures) -> list[int]:
        """How many of the base image's top patches lie in each of the other tiles."""
        (columns, rows), n = features.tile_grid, features.n
        if columns * rows != features.n_tiles - 1:
            raise ValueError(
                f"HiRED needs to know where {features.n_tiles - 1} tiles lie, tile_grid is "
                f"{features.tile_grid}; use a checkpoint whose mm_patch_merge_type is spatial"
            )
        top = int((1 - Fraction(str(self.alpha))) * features.n_patches)
        if not top:
            return [1] * (rows * columns)
        patch = best(finite(cls_attention(features, self.layers[0]))[0], top)
        if self.faithful:
            tile = patch * rows * columns // features.n_patches
        else:
            tile = patch // n * rows // n * columns + patch % n * columns // n
        return tile.bincount(minlength=rows * columns).tolist()


def _share_out(total: int, masses: list[int], most: int) -> list[int]:
    """Split `total` in proportion to masses, at most `most` each; largest remainders first."""
    counts = [0] * len(masses)
    while left := total - sum(counts):  # again with what did not fit
        room = [count < most for count in counts]
        shares = [mass * free for mass, free in zip(masses, room, strict=True)]
        shares = shares if any(shares) else [int(free) for free in room]
        parts = [left * mass // sum(shares) for mass in shares]
        fractions = [left * mass % sum(shares) for mass in shares]
        for i in sorted(range(len(parts)), key=lambda i: -fractions[i])[: left - sum(parts)]:
            parts[i] += 1
        counts = [min(count + part, most) for count, part in zip(counts, parts, strict=True)]
    return counts
