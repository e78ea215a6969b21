"""SCOPE: the salient patches that best cover what is not kept yet."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from llava_hivtp.importance import cls_attention, received_attention
from llava_hivtp.pruners.base import PaperLayers, ScorePruner, check_layers, finite, share
from llava_hivtp.vision import VisionFeatures

SALIENCY = {
    "cls": cls_attention,
    "received": lambda features, layer: received_attention(features, (layer,)),
}


@dataclass
class SCOPE(ScorePruner):
    """Greedy gain in coverage times saliency (arXiv 2510.24214).

    A patch is covered as well as its best cosine to a kept one, at least 0. Each step keeps the
    patch whose gain in coverage, summed over all patches, times saliency^alpha is highest. Tokens
    are compared as the tower gives them. Saliency is the attention from CLS, as published, or the
    attention received from all tokens, which a tower without CLS has as well.

    Where we differ from the released code: it divides the number of tokens by the tiles and images
    of the call, so that a batch of two keeps half of each image; here every tile keeps
    floor(keep * N). It computes in the model's precision. Ties go to the lowest index, there as
    here; with alpha=0 two patches that cover each other and nothing else tie but for rounding.
    """

    layers: tuple[int, ...] = PaperLayers((23,))
    saliency: str = "cls"  # or "received"
    alpha: float = 1.0  # exponent of the saliency, from 0

    @property
    def needs_cls(self) -> bool:
        """Only the published saliency does."""
        return self.saliency == "cls"

    def validate(self) -> None:
        """Also that there is one layer, a known saliency, and no negative exponent."""
        super().validate()
        check_layers(self.layers, 1, "one layer")
        if self.saliency not in SALIENCY:
            raise ValueError(f"saliency must be one of {tuple(SALIENCY)}, got {self.saliency!r}")
        if self.alpha < 0:
            raise ValueError(f"alpha must be a number from 0, got {self.alpha}")

    def score(self, features: VisionFeatures) -> Tensor:
        """K for the first pick, 1 for the last, 0 for the others, (T, N)."""
        count = share(self.keep, features.n_patches)
        saliency = finite(SALIENCY[self.saliency](features, *self.layers)) ** self.alpha
        directions = normalize(features.tokens.float(), dim=-1)
        likeness = finite(directions @ directions.transpose(1, 2))  # (T, N, N)
        return _cover(likeness, saliency, count)


def _cover(likeness: Tensor, weight: Tensor, count: int) -> Tensor:
    """`count` for the first pick, 1 for the last, 0 for the others, (T, N).

    A patch is covered as well as its greatest likeness to a picked one, at least 0. Each step picks
    the patch whose gain in coverage, summed over all patches, times weight is highest. Ties go to
    the lowest index.

    Args:
        likeness: (T, N, N) cosines.
        weight: (T, N).
        count: picks in every tile.
    """
    covered = torch.zeros_like(weight)
    scores = torch.zeros_like(weight)
    tiles = torch.arange(len(weight), device=scores.device)
    for value in range(count, 0, -1):
        gain = (likeness - covered[:, :, None]).clamp(min=0).sum(1) * weight
        pick = gain.masked_fill(scores > 0, -torch.inf).argmax(1)
        scores[tiles, pick] = value
        covered = torch.maximum(covered, likeness[tiles, pick])
    return scores
