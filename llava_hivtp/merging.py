"""Merge what a method drops into the tokens it keeps: the last step of any method."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from llava_hivtp.vision import KeptTokens, VisionFeatures


def merge_dropped(
    kept: KeptTokens, features: VisionFeatures, average: bool, shown: Tensor | None = None
) -> KeptTokens:
    """Let every dropped patch join the kept one of its tile with the highest cosine of tokens.

    Ties go to the lowest patch. A tile of which nothing is kept joins nothing. What is no patch
    (CLS) stays alone.

    Args:
        kept: what a method chose; every patch once.
        features: of the same tiles.
        average: make a token the mean of its patches, not only count them in `size`.
        shown: (T, N) bool, which patches may join; None: all.
    """
    places = kept.patch >= 0
    tile, patch = (column.to(features.tokens.device)[places] for column in (kept.tile, kept.patch))
    stay = torch.zeros(features.tokens.shape[:2], dtype=torch.bool, device=tile.device)
    stay[tile, patch] = True
    joins = stay.any(1, keepdim=True) & ~stay
    joins = joins if shown is None else joins & shown.to(joins.device)
    tokens, sizes = zip(*map(_joined, features.tokens.float(), stay, joins), strict=True)
    size = kept.size.clone()
    size[places] = torch.stack(sizes)[tile, patch]
    if not average:
        return replace(kept, size=size)
    means = torch.stack(tokens)[tile, patch]
    new = kept.tokens.clone()
    # A token that nothing joined stays as it is, to the bit.
    new[places] = torch.where(size[places, None] > 1, means.to(new.dtype), new[places])
    return replace(kept, tokens=new, size=size)


def _joined(tokens: Tensor, stay: Tensor, joins: Tensor) -> tuple[Tensor, Tensor]:
    """Of a tile's (N, D) tokens: the mean at every patch that stays, and of how many it is."""
    directions = normalize(tokens, dim=-1)
    likeness = (directions @ directions.T).masked_fill(~stay, -torch.inf)
    members = one_hot(likeness.argmax(1), len(tokens)).float() * joins[:, None]
    members = members + torch.diag(stay.float())
    counts = members.sum(0)
    return members.T @ tokens / counts.clamp(min=1)[:, None], counts
