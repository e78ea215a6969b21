"""Cover: the farthest patch next, important ones first, compared halfway through the projector."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from llava_hivtp.farthest import farthest_first
from llava_hivtp.importance import cls_attention, received_attention
from llava_hivtp.pruners.base import (
    PaperLayers,
    ScorePruner,
    check_layers,
    check_share,
    finite,
    keep_mask,
    share,
)
from llava_hivtp.vision import KeptTokens, VisionFeatures

IMPORTANCE = ("cls", "received", "equal")
_POWER = 0.25  # of importance: a patch twice as important is kept at 0.84 of the distance


@dataclass
class Cover(ScorePruner):
    """Greedy max-min diversity times importance: this project's own, no paper.

    The first pick is the most important patch, each next one the patch whose distance to its
    nearest pick, 1 - cosine, times importance to the power 1/4 is highest. Importance is what CLS
    pays in one layer; or the attention received in some layers, as HIVTP scores it; or the same for
    all, which leaves DivPrune but for its first pick and for what it compares. Ties go to the
    lowest index.

    Patches are compared by what the projector's last linear layer reads. So all N of them pay the
    layers before it, in LLaVA-7B a fifth of the projector, of which DivPrune pays the whole.

    With `reach` a tile keeps no more picks once they cover that share of what is distinct in it:
    sum of distinctness times coverage over sum of distinctness. A patch is covered as well as its
    best cosine to a pick, at least 0; distinctness is 1 - the cosine to the mean of all tokens.
    Then an image, and each tile of it, has as many tokens as that takes, from 1 to floor(keep * N)
    a tile. `python -m eval calibrate` finds the value that makes a given mean. How many stay hangs
    on the image alone and is known before the language model starts; a GPU is waited for once.
    """

    layers: tuple[int, ...] = PaperLayers((23,))
    importance: str = "cls"  # of one layer; or "received", of some; or "equal"
    reach: float | None = None  # share of distinctness to cover; None: always floor(keep * N)

    @property
    def needs_cls(self) -> bool:
        """Only where importance is what CLS attends to."""
        return self.importance == "cls"

    @property
    def calibrated(self) -> bool:
        """Where an image decides how many stay."""
        return self.reach is not None

    def varies_by(self) -> str:
        """`reach`, where it is given."""
        return f"reach={self.reach}" if self.calibrated else ""

    def validate(self) -> None:
        """Also that importance is known, and for "cls" that there is one layer."""
        super().validate()
        if self.importance not in IMPORTANCE:
            raise ValueError(f"importance must be one of {IMPORTANCE}, got {self.importance!r}")
        if self.importance == "cls":
            check_layers(self.layers, 1, "one layer with importance=cls")
        if self.reach is not None:
            check_share("reach", self.reach)

    def select(self, features: VisionFeatures) -> KeptTokens:
        """Keep the picks, in every tile as many as `keep` and `reach` say."""
        if self.reach is None:
            return super().select(features)
        return keep_mask(features, self.needed_above(features) < self.reach)

    def score(self, features: VisionFeatures) -> Tensor:
        """K for the first pick, 1 for the last, 0 for the others, (T, N)."""
        directions = normalize(features.half_projected(), dim=-1)
        return self._picks(features, directions @ directions.mT)

    def needed_above(self, features: VisionFeatures) -> Tensor:
        """`reach` above which each patch stays, (T, N): infinite for those that never do."""
        halfway = features.half_projected()
        directions = normalize(halfway, dim=-1)
        middle = normalize(halfway.mean(1, keepdim=True), dim=-1)
        distinct = (1 - (directions * middle).sum(-1)).clamp(min=0)
        likeness = directions @ directions.mT
        scores = self._picks(features, likeness)
        return _covered_before(likeness, distinct, scores, share(self.keep, features.n_patches))

    def _picks(self, features: VisionFeatures, likeness: Tensor) -> Tensor:
        weight = finite(self._importance(features)) ** _POWER
        distance = (1 - finite(likeness)).clamp(min=0) * weight[:, None]
        return farthest_first(distance, weight, share(self.keep, features.n_patches))

    def _importance(self, features: VisionFeatures) -> Tensor:
        if self.importance == "cls":
            return cls_attention(features, *self.layers)
        if self.importance == "received":
            return received_attention(features, self.layers)
        return torch.ones(features.tokens.shape[:2], device=features.tokens.device)


def _covered_before(likeness: Tensor, weight: Tensor, scores: Tensor, count: int) -> Tensor:
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
    parts = (covered @ weight[:, :, None])[..., 0] / total
    parts = torch.where(total > 0, parts, 1.0).cummax(1).values  # rounding may lower it
    before = torch.cat([torch.zeros_like(parts[:, :1]), parts[:, :-1]], 1)
    return torch.full_like(scores, torch.inf).scatter(1, picks, before)
