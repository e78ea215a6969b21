"""The patch that is farthest from those picked before it, one by one."""

from __future__ import annotations

import torch
from torch import Tensor


def farthest_first(distance: Tensor, first: Tensor, count: int) -> Tensor:
    """`count` for the first pick, 1 for the last, 0 for the others, (T, N).

    The first pick is the patch where `first` is highest, each next one the patch whose distance
    from its nearest pick is greatest. No patch is picked twice. Ties go to the lowest index.

    Args:
        distance: (T, N, N), of every patch (last) from each one it may be compared with.
        first: (T, N).
        count: picks in every tile.
    """
    scores, nearest = torch.zeros_like(first), torch.full_like(first, torch.inf)
    tiles = torch.arange(len(first), device=first.device)
    pick = first.argmax(1)
    for value in range(count, 0, -1):
        scores[tiles, pick] = value
        nearest = torch.minimum(nearest, distance[tiles, pick])
        pick = nearest.masked_fill(scores > 0, -torch.inf).argmax(1)
    return scores
