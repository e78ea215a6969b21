"""HoloV: a share of the budget for every strip, then what CLS attends to in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from llava_hivtp.importance import cls_attention
from llava_hivtp.pruners.base import PaperLayers, ScorePruner, check_layers, finite, share
from llava_hivtp.vision import VisionFeatures

TINY = 1e-6  # keeps the released code from dividing by zero


@dataclass
class HoloV(ScorePruner):
    """Holistic context by crops (arXiv 2510.02912).

    The patches of a tile are cut into `crops` strips, in reading order. A patch scores its CLS
    attention plus alpha times the variance of its cosines to the others of its strip (of projected
    tokens), scaled to the mean attention of the strip. Of K = floor(keep * N) tokens a strip gets
    floor(K * its share of the sum of mean scores), the best strips one of the remainder each; it
    keeps the patches CLS attends to most.

    Scaled like that, the variance adds the same share alpha to every strip: the released code in
    effect, and so this one, spends the budget by attention alone.

    Where we differ from that code: where a strip is given more tokens than it has, the code fills
    up with zeros, here the patches CLS attends to most elsewhere stay. It returns the patches of a
    strip by falling attention, here in reading order. It runs over a whole LLaVA-NeXT image with 64
    tokens fixed; here every tile keeps its share. It fails on several AnyRes images.
    """

    layers: tuple[int, ...] = PaperLayers((23,))
    crops: int = 16  # strips of a tile, at most N
    alpha: float = 0.09  # weight of the variance, from 0

    needs_cls: ClassVar[bool] = True

    def validate(self) -> None:
        """Also that there is one layer, a strip, and no negative weight."""
        super().validate()
        check_layers(self.layers, 1, "one layer")
        if self.crops < 1:
            raise ValueError(f"crops must be a whole number from 1, got {self.crops}")
        if self.alpha < 0:
            raise ValueError(f"alpha must be a number from 0, got {self.alpha}")

    def score(self, features: VisionFeatures) -> Tensor:
        """CLS attention, plus 1 for what a strip keeps within its share, (T, N)."""
        attention = finite(cls_attention(features, *self.layers))
        directions = normalize(features.projected(), dim=-1)
        count, crops = share(self.keep, features.n_patches), min(self.crops, features.n_patches)
        strips = list(
            zip(*(x.tensor_split(crops, 1) for x in (attention, directions)), strict=True)
        )
        means = torch.stack([self._mean_score(*strip) for strip in strips], 1)  # (T, crops)
        weights = means / (means.sum(1, keepdim=True) + TINY)
        shares = (weights * count).floor()
        rest = count - shares.sum(1, keepdim=True)
        shares += _ranks(weights) < rest
        own = zip(strips, shares.split(1, 1), strict=True)
        within = [_ranks(attended) < most for (attended, _), most in own]
        return attention + torch.cat(within, 1)

    def _mean_score(self, attention: Tensor, directions: Tensor) -> Tensor:
        """Mean score of a strip with (T, M) attention and (T, M, D_lm) directions, (T,)."""
        size = attention.shape[1]
        likeness = directions @ directions.transpose(1, 2)
        likeness.diagonal(dim1=1, dim2=2).zero_()  # itself counts as 0 in the spread, as released
        others = max(1, size - 1)
        mean = likeness.sum(2, keepdim=True) / others
        variance = finite((likeness - mean).square().sum(2) / others)
        attention = attention * 1e3
        scale = attention.mean(1, keepdim=True) / (variance.mean(1, keepdim=True) + TINY)
        return (attention + self.alpha * scale * variance).mean(1)


def _ranks(scores: Tensor) -> Tensor:
    """Place of each of (T, M) scores in its row, 0 for the highest; ties go to the lowest index."""
    return scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
