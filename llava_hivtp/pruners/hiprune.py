"""HiPrune: middle-layer anchors, their neighbours, then what the deep layer attends to."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from llava_hivtp.importance import received_attention
from llava_hivtp.pruners.base import (
    PaperLayers,
    ScorePruner,
    best,
    check_layers,
    check_part,
    share,
)
from llava_hivtp.vision import VisionFeatures


@dataclass
class HiPrune(ScorePruner):
    """Hierarchical attention pruning (arXiv 2508.00553).

    Of K = floor(keep * N) patches of a tile, round(alpha * K / 5) are anchors: those that receive
    most attention in the object layer. Their neighbours above, below, left and right are buffers.
    Registers, those that receive most attention in the deep layer, fill up to K. Attention is the
    mean over heads and all 1 + N queries; alpha and the layers are those of the released code.

    Where we differ from that code: it finds neighbours by adding to the flat index, so that a
    patch at the end of a row neighbours the next row and patches beyond the grid become its
    corners; and it fails where the buffers alone exceed K, here anchors stop at floor(K / 5). That
    stop also acts on an alpha near 1 with which the code would not fail. On LLaVA-NeXT the code
    neither unpads nor breaks rows: layout `mosaic`.
    """

    layers: tuple[int, ...] = PaperLayers((9, 23))  # object layer, deep layer
    alpha: float = 0.1  # share of K meant for anchors and buffers, in [0, 1]

    by_tile: ClassVar[bool] = True
    chooses_inside: ClassVar[bool] = True

    def validate(self) -> None:
        """Also that alpha is a share, and that there are two layers."""
        check_part("alpha", self.alpha)
        super().validate()
        check_layers(self.layers, 2, "object layer and deep layer")

    def score(self, features: VisionFeatures) -> Tensor:
        """Attention of the deep layer, plus 1 for anchors and buffers, (T, N)."""
        count = share(self.keep, features.n_patches)
        anchors = min(round(Fraction(str(self.alpha)) * count / 5), count // 5)
        middle = received_attention(features, self.layers[:1])
        first = torch.zeros_like(middle).scatter_(1, best(middle, anchors), 1)
        near = _with_neighbours(first, features.sides)
        return received_attention(features, self.layers[1:]) + near


def _with_neighbours(marks: Tensor, sides: tuple[int, int]) -> Tensor:
    """Spread marks (T, N) of 0 and 1 to the four neighbours of each on the grid."""
    grid = marks.unflatten(1, sides)
    spread = grid.clone()
    for here, there in ((slice(1, None), slice(None, -1)), (slice(None, -1), slice(1, None))):
        spread[:, here] += grid[:, there]
        spread[:, :, here] += grid[:, :, there]
    return spread.clamp(max=1).flatten(1)
