"""PruMerge and PruMerge+: patches CLS attends to, each merged with those like it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from llava_hivtp.importance import cls_attention
from llava_hivtp.pruners.base import PaperLayers, ScorePruner, best, check_layers, finite, share
from llava_hivtp.vision import KeptTokens, VisionFeatures

NEIGHBOURS = 32  # tokens merged into each centre


@dataclass
class PruMerge(ScorePruner):
    """Prune and merge by the last layer's CLS attention, all heads as one (arXiv 2403.15388).

    Of K = floor(keep * N) tokens of a tile, K - 1 are centres: the patches CLS attends to most,
    in falling order. To each, the 32 others most alike by their keys are added, weighted by
    attention (not normalised, the centre by 1). The last token sums up all that is no centre.
    With `adaptive`, outliers are the centres: attention above Q3 + 1.5 (Q3 - Q1) of the tile, at
    most K - 1 of them. Merged tokens have a `centre`, but no `patch`; tiles follow one another.
    A patch counts in equal parts for the tokens that it went into: sizes of a tile add up to N.

    Where we differ from the released code: it takes the quartiles over the whole batch.
    """

    layers: tuple[int, ...] = PaperLayers((24,))
    adaptive: bool = False

    needs_cls: ClassVar[bool] = True
    merges: ClassVar[bool] = True

    def validate(self) -> None:
        """Also that there is one layer."""
        super().validate()
        check_layers(self.layers, 1, "one layer")

    def score(self, features: VisionFeatures) -> Tensor:
        """Attention of CLS with all heads joined to one, (T, N)."""
        return cls_attention(_joined(features), *self.layers)

    def select(self, features: VisionFeatures) -> KeptTokens:
        """Merged tokens, tile by tile, the sum of the rest last in each."""
        features = _joined(features)
        attention = finite(cls_attention(features, *self.layers))
        (layer,) = self.layers
        keys = normalize(features.keys[layer][:, 0, 1:].float(), dim=-1)
        centres = self._centres(attention)
        each = zip(features.tokens.float(), attention, keys, centres, strict=True)
        tokens, sizes = zip(*(_merge(*tile) for tile in each), strict=True)
        counts = torch.tensor([len(merged) for merged in tokens], device=attention.device)
        tile = torch.arange(len(tokens), device=attention.device).repeat_interleave(counts)
        merged = torch.cat(tokens).to(features.tokens.dtype)
        nowhere = torch.full_like(tile, -1)
        centre = torch.cat([part for own in centres for part in (own, nowhere[:1])])
        return KeptTokens(merged, tile, nowhere, centre, torch.cat(sizes))

    def budget(self, n_tiles: int, n_patches: int) -> int:
        """floor(keep * N) in every tile."""
        count = share(self.keep, n_patches)
        if count < 2:
            raise ValueError(
                f"keep={self.keep} of {n_patches} patches is one token; {type(self).__name__} "
                "needs two, a centre and the rest: raise keep"
            )
        return n_tiles * count

    def varies_by(self) -> str:
        """Outliers are as many as the image has."""
        return "adaptive=True" if self.adaptive else ""

    def _centres(self, attention: Tensor) -> list[Tensor]:
        """Centres of every tile, of (T, N) attention."""
        most = self.budget(1, attention.shape[1]) - 1
        each = zip(attention, _outliers(attention), strict=True)
        return [self.centres(weight, outliers, most) for weight, outliers in each]

    def centres(self, attention: Tensor, outliers: int, most: int) -> Tensor:
        """Centres of a tile with (N,) attention, in the order they are returned."""
        order = attention.argsort(descending=True, stable=True)
        return order[: min(outliers, most) if self.adaptive else most]


@dataclass
class PruMergePlus(PruMerge):
    """PruMerge with evenly spaced patches as further centres (arXiv 2403.15388).

    Outliers, at most floor((K - 1) / 2), come first; the other centres are spread evenly over the
    remaining patches so that K tokens come out. That is a rule of ours: with a fixed ratio r the
    released code takes the top floor(r N) patches and every 1/r-th one, some of them twice, which
    works for few ratios. That code is adaptive by default, this is not, so that it keeps a budget.
    With `adaptive`, every s-th patch joins, s = floor(floor(N / outliers) / 3), as in the released
    code, unless that exceeds K tokens. Without any outlier, where that code divides by zero, the
    first patch joins alone; the last patch, which it never reaches, may join.
    """

    def centres(self, attention: Tensor, outliers: int, most: int) -> Tensor:
        """Outliers by falling attention, then evenly spaced patches."""
        order = attention.argsort(descending=True, stable=True)
        found = order[: min(outliers, most if self.adaptive else most // 2)]
        index = torch.arange(len(order), device=order.device)
        rest = index[~torch.isin(index, found)]
        if self.adaptive:
            step = max(1, len(order) // outliers // 3) if outliers else len(order)
            even = rest[rest % step == 0]
            if len(found) + len(even) <= most:
                return torch.cat([found, even])
        count = most - len(found)
        middles = 2 * torch.arange(count, device=order.device) + 1
        return torch.cat([found, rest[middles * len(rest) // max(1, 2 * count)]])


def _joined(features: VisionFeatures) -> VisionFeatures:
    """The same features with all heads side by side as one."""
    queries, keys = (
        {layer: heads.transpose(1, 2).flatten(2)[:, None] for layer, heads in tapped.items()}
        for tapped in (features.queries, features.keys)
    )
    return replace(features, queries=queries, keys=keys)


def _outliers(attention: Tensor) -> list[int]:
    """How many patches of each tile lie above the upper whisker."""
    first, third = attention.quantile(attention.new_tensor([0.25, 0.75]), dim=1)
    return (attention > (third + 1.5 * (third - first))[:, None]).sum(1).tolist()


def _merge(tokens: Tensor, weight: Tensor, keys: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Centres with their weighted neighbours, the weighted sum of the rest; and their sizes."""
    likeness = keys[centres] @ keys.T  # (m, N)
    likeness.scatter_(1, centres[:, None], -torch.inf)  # a centre is not its own neighbour
    near = best(likeness, min(NEIGHBOURS, len(tokens) - 1))
    joined = torch.zeros_like(likeness).scatter_(1, near, 1)
    weights = joined * weight
    rest = weight.scatter(0, centres, 0)
    merged = torch.cat([tokens[centres] + weights @ tokens, (rest @ tokens)[None]])
    loose = torch.ones_like(weight).scatter(0, centres, 0)
    parts = torch.cat([joined.scatter(1, centres[:, None], 1), loose[None]])
    return merged, (parts / parts.sum(0)).sum(1)
