"""VisionZip: what CLS attends to, and the rest merged into a few tokens."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from llava_hivtp.importance import cls_attention
from llava_hivtp.pruners.base import (
    PaperLayers,
    Pruner,
    best,
    check_layers,
    check_share,
    finite,
    share,
)
from llava_hivtp.vision import KeptTokens, VisionFeatures


@dataclass
class VisionZip(Pruner):
    """Dominant and contextual tokens (arXiv 2412.04467).

    Dominant are CLS and the patches it attends to most. Of the others every step-th, step =
    floor(M / contextual), becomes a contextual token: the others most alike to it by their keys,
    averaged over heads, are averaged and added to it. Give `dominant` and `contextual` per tile,
    or `keep`, which splits K = floor(keep * N) 54 to 10 as the authors do.

    Order: [CLS, dominant, contextual] of the base tile; of the other tiles all dominant patches,
    all CLS, all contextual tokens. Released code and ours agree but for precision (float32 here),
    on LLaVA-NeXT under layout `mosaic`: the code neither unpads nor breaks rows. A contextual token
    stands for itself and the patches merged into it.
    """

    layers: tuple[int, ...] = PaperLayers((23,))
    keep: float = 1.0  # share of the N patches of a tile, in (0, 1]
    dominant: int | None = None  # patches chosen by attention, and CLS
    contextual: int | None = None

    needs_cls: ClassVar[bool] = True
    merges: ClassVar[bool] = True

    def validate(self) -> None:
        """Also that a share is given, or two counts, and one layer."""
        check_share("keep", self.keep)
        super().validate()
        check_layers(self.layers, 1, "one layer")
        given = (self.dominant, self.contextual)
        if any(value is not None for value in given) and (
            self.keep != 1 or any(type(value) is not int for value in given) or min(given) < 0
        ):
            raise ValueError(
                "give keep, or dominant and contextual as whole numbers; got "
                f"keep={self.keep}, dominant={self.dominant!r}, contextual={self.contextual!r}"
            )

    def split(self, n_patches: int) -> tuple[int, int]:
        """Dominant tokens, CLS included, and contextual tokens of a tile."""
        if self.dominant is not None:
            dominant, contextual = self.dominant, self.contextual
        else:
            count = share(self.keep, n_patches)
            contextual = int(Fraction(count * 10, 64) + Fraction(1, 2))
            dominant = count - contextual
        if dominant < 1 or dominant + contextual > 1 + n_patches:
            raise ValueError(
                f"dominant={dominant}, contextual={contextual} do not fit the {1 + n_patches} "
                "tokens of a tile: dominant is at least 1 (CLS), their sum at most that"
            )
        return dominant, contextual

    def select(self, features: VisionFeatures) -> KeptTokens:
        """Dominant and contextual tokens of every tile."""
        dominant, contextual = self.split(features.n_patches)
        patch, rest = self._divided(features, dominant)
        metric = features.keys[self.layers[0]].float().mean(1)[:, 1:]  # (T, N, Dh)
        merged, sizes = _merge(_rows(features.tokens, rest), _rows(metric, rest), contextual)
        tokens = [features.cls[:, None], _rows(features.tokens, patch), merged]
        targets = _targets(rest.shape[1], contextual).to(rest.device, non_blocking=True)
        return _in_order(torch.cat(tokens, 1), patch, rest[:, targets], sizes)

    def _divided(self, features: VisionFeatures, dominant: int) -> tuple[Tensor, Tensor]:
        """Patches of every tile: the dominant ones but for CLS, (T, K), and the others."""
        attention = finite(cls_attention(features, *self.layers))
        patch = best(attention, dominant - 1)
        is_rest = torch.ones_like(attention).scatter_(1, patch, 0)
        return patch, best(is_rest, features.n_patches + 1 - dominant)

    def budget(self, n_tiles: int, n_patches: int) -> int:
        """`dominant` + `contextual`, or floor(keep * N), in every tile."""
        return n_tiles * sum(self.split(n_patches))


def _rows(tokens: Tensor, index: Tensor) -> Tensor:
    """Rows (T, K) of (T, N, D)."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))


def _merge(tokens: Tensor, metric: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Merge (T, M, D) tokens into `count` targets by likeness of their metric.

    Also returns how many tokens each target then stands for, (T, count).
    """
    if not count:
        return tokens[:, :0], metric[:, :0, 0]
    is_target, metric = _targets(tokens.shape[1], count), normalize(metric, dim=-1)
    target, other = (
        part.nonzero().flatten().to(tokens.device, non_blocking=True)
        for part in (is_target, ~is_target)
    )
    likeness = metric[:, other] @ metric[:, target].transpose(1, 2)
    chosen = one_hot(likeness.argmax(2), count).float()  # (T, M - count, count)
    sums, others = chosen.transpose(1, 2) @ tokens[:, other].float(), chosen.sum(1)
    means = sums / others.clamp(min=1)[..., None]
    return (tokens[:, target].float() + means).to(tokens.dtype), 1 + others


def _targets(others: int, count: int) -> Tensor:
    """Which of the tokens that are not dominant are targets: every step-th, (M,) bool."""
    index, step = torch.arange(others), max(1, others // max(1, count))
    return (index % step == 0) & (index < step * count)


def _in_order(tokens: Tensor, patch: Tensor, centre: Tensor, sizes: Tensor) -> KeptTokens:
    """Lay out the (T, 1 + dominant patches + contextual, D) tokens of all tiles.

    `sizes` (T, contextual) are how many patches the contextual ones stand for, the others for one.
    """
    tiles, count = tokens.shape[:2]
    place = patch.new_full((tiles, count), -1)
    place[:, 1 : 1 + patch.shape[1]] = patch
    group = torch.where(place >= 0, 1, 3)  # behind the base tile 0: dominant 1, contextual 3
    group[:, 0] = 2  # CLS
    group[0] = 0
    order = group.flatten().argsort(stable=True)
    centre = torch.cat([place[:, : count - centre.shape[1]], centre], 1)
    size = torch.cat([sizes.new_ones(tiles, count - sizes.shape[1]), sizes], 1)
    each = (column.flatten()[order] for column in (place, centre, size))
    return KeptTokens(tokens.flatten(0, 1)[order], order // count, *each)
