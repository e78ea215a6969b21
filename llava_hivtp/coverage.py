"""Patches that together stand best for all others."""

from __future__ import annotations

import torch
from torch import Tensor


def cover_greedily(likeness: Tensor, weight: Tensor, count: int) -> Tensor:
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
