"""VisPruner: what CLS attends to, then what is least like the rest."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from llava_hivtp.importance import cls_attention
from llava_hivtp.pruners.base import (
    PaperLayers,
    ScorePruner,
    check_layers,
    check_part,
    finite,
    share,
)
from llava_hivtp.vision import VisionFeatures

STEP = 8  # most patches removed between two comparisons


@dataclass
class VisPruner(ScorePruner):
    """Important tokens by attention, diverse tokens by similarity (arXiv 2412.01818).

    Of K = floor(keep * N) patches of a tile, floor(important * K) are those CLS attends to most.
    The others start in order of attention; while more than wanted are left, the up to 8 of every
    other one that are most alike one in between go, and the survivors among them come first in
    the next comparison, most alike first.

    Where we differ from the released code: it stops with an error on an odd number of candidates,
    and where fewer than 8 can go; here the odd one takes part, and so many go as can. A rounding
    error may reorder the candidates and change many picks, there as here. On LLaVA-NeXT the code
    neither unpads nor breaks rows: layout `mosaic`.
    """

    layers: tuple[int, ...] = PaperLayers((23,))
    important: float = 0.5  # share of K chosen by attention, in [0, 1]

    needs_cls: ClassVar[bool] = True

    def validate(self) -> None:
        """Also that `important` is a share, and that there is one layer."""
        check_part("important", self.important)
        super().validate()
        check_layers(self.layers, 1, "one layer")

    def score(self, features: VisionFeatures) -> Tensor:
        """1 for a patch that stays, 0 for the others, (T, N)."""
        count = share(self.keep, features.n_patches)
        important = int(Fraction(str(self.important)) * count)
        attention = finite(cls_attention(features, *self.layers))
        order = attention.argsort(descending=True, stable=True)
        directions = normalize(features.tokens.float(), dim=-1)
        likeness = finite(directions @ directions.transpose(1, 2))  # (T, N, N)
        diverse = _distinct(likeness, order[:, important:], count - important)
        stay = torch.cat([order[:, :important], diverse], 1)
        return torch.zeros_like(attention).scatter_(1, stay, 1)


def _distinct(likeness: Tensor, patch: Tensor, count: int) -> Tensor:
    """Remove those of (T, R) patches that are most alike another one until `count` are left."""
    if not count:
        return patch[:, :0]
    tiles = torch.arange(len(patch), device=patch.device)[:, None]
    while patch.shape[1] > count:
        even, odd = patch[:, ::2], patch[:, 1::2]
        alike = likeness[tiles[..., None], even[..., None], odd[:, None]].amax(2)
        order = alike.argsort(descending=True, stable=True)
        gone = min(STEP, patch.shape[1] - count, even.shape[1])
        patch = torch.cat([even.gather(1, order[:, gone:]), odd], 1)
    return patch
