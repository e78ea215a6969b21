"""Patches that together stand for all others, chosen one by one, and how well they do."""

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


def farthest_first(likeness: Tensor, weight: Tensor, count: int) -> Tensor:
    """`count` for the first pick, 1 for the last, 0 for the others, (T, N).

    The first pick is the patch of the highest weight, each next one that whose distance to its
    nearest pick, 1 - cosine, times weight is highest. Ties go to the lowest index.

    Args:
        likeness: (T, N, N) cosines.
        weight: (T, N), at least 0.
        count: picks in every tile.
    """
    nearest, scores = torch.ones_like(weight), torch.zeros_like(weight)
    tiles = torch.arange(len(weight), device=scores.device)
    for value in range(count, 0, -1):
        pick = (nearest * weight).masked_fill(scores > 0, -torch.inf).argmax(1)
        scores[tiles, pick] = value
        distance = (1 - likeness[tiles, pick]).clamp(min=0)
        nearest = distance if value == count else torch.minimum(nearest, distance)
    return scores


def covered_before(likeness: Tensor, weight: Tensor, scores: Tensor, count: int) -> Tensor:
    """Share of the weight that was covered before each patch was picked, (T, N).

    It is sum(weight * coverage) / sum(weight): 0 for the first pick, infinite for a patch that was
    not picked. It never falls from one pick to the next. A tile without weight is covered by one.

    Args:
        likeness: (T, N, N) cosines.
        weight: (T, N).
        scores: `count` for the first pick, 1 for the last, 0 for the others, (T, N).
        count: picks in every tile.
    """
    picks = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
    tiles = torch.arange(len(picks), device=picks.device)[:, None]
    covered = likeness[tiles, picks].clamp(min=0).cummax(1).values  # (T, count, N)
    total = weight.sum(1, keepdim=True)
    share = (covered @ weight[:, :, None])[..., 0] / total
    share = torch.where(total > 0, share, 1.0).cummax(1).values  # rounding may lower it
    before = torch.cat([torch.zeros_like(share[:, :1]), share[:, :-1]], 1)
    return torch.full_like(scores, torch.inf).scatter(1, picks, before)
