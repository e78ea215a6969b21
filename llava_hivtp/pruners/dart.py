"""DART: a few pivots, and what is least like each of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from llava_hivtp.pruners.base import finite
from llava_hivtp.pruners.layered import LayerPruner, LayerState


@dataclass
class DART(LayerPruner):
    """Duplication-aware reduction of tokens (arXiv 2502.11494).

    Pivots are the image tokens, and the text tokens behind the image, whose keys in this layer have
    the highest L1 norm. In turn, image pivots first, by falling norm, each keeps the image tokens
    least like it that are not kept yet, by the cosine of hidden states behind the last norm. Of
    K = floor(keep * V) tokens the image pivots are the first, all pivots keep equally many of the
    rest, the first of them one more each where it does not divide.

    Where we differ from the code in github.com/ModelTC/LightCompress: it takes the pivots in the
    order of a Python set, which depends on their positions, and keeps floor(K / pivots) tokens a
    pivot beside the image pivots, up to that many more or fewer than K: 196 for 192. With its order
    and counts the choices are equal. It knows one row of one image.
    """

    after: tuple[int, ...] = (2,)
    keep: tuple[float, ...] = (0.5,)
    image_pivots: int = 4
    text_pivots: int = 4

    def validate(self) -> None:
        """Also that there is a pivot."""
        super().validate()
        if self.image_pivots < 1 or self.text_pivots < 0:
            raise ValueError(
                f"image_pivots must be at least 1, text_pivots at least 0; got {self.image_pivots} "
                f"and {self.text_pivots}"
            )

    def stay(self, state: LayerState, counts: list[int]) -> Tensor:
        """Which positions stay, (B, S) bool; ties go to the lowest position."""
        length = finite(state.keys(state.layer).float().abs().sum((1, 3)))  # (B, S)
        directions = normalize(state.norm(state.hidden).float(), dim=-1)
        stay = state.real & ~state.image
        for row, count in enumerate(counts):
            if count:
                stay[row, self._row(length[row], directions[row], state, row, count)] = True
        return stay

    def _row(
        self, length: Tensor, directions: Tensor, state: LayerState, row: int, count: int
    ) -> Tensor:
        """Positions of one row's image tokens that stay."""
        pivots = [
            _highest(length, mask[row], most)
            for mask, most in ((state.image, self.image_pivots), (state.asking, self.text_pivots))
        ]
        kept = [pivots[0][:count]]
        free = state.image[row].clone()
        free[kept[0]] = False
        rest, pivots = count - len(kept[0]), torch.cat(pivots)
        for i, pivot in enumerate(pivots):
            most = rest // len(pivots) + (i < rest % len(pivots))
            kept.append(_highest(-(directions @ directions[pivot]), free, most))
            free[kept[-1]] = False
        return torch.cat(kept)


def _highest(scores: Tensor, mask: Tensor, count: int) -> Tensor:
    """Positions of the highest of (S,) scores where the mask holds, highest first."""
    order = scores.masked_fill(~mask, -torch.inf).argsort(descending=True, stable=True)
    return order[: min(count, int(mask.sum()))]
