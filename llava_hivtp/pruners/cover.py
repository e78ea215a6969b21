"""Cover: patches that best stand for the important ones, as the language model sees them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import normalize

from llava_hivtp.coverage import cover_greedily, covered_before
from llava_hivtp.importance import cls_attention
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

IMPORTANCE = ("both", "cls", "distinct")


@dataclass
class Cover(ScorePruner):
    """Greedy gain in coverage of projected tokens times importance: this project's own, no paper.

    A patch is covered as well as its best cosine to a kept one, at least 0. Each step keeps the
    patch whose gain in coverage, summed over all patches, times importance is highest. Tokens are
    compared as the language model sees them. Importance is the geometric mean of the attention
    from CLS and of distinctness, 1 - the cosine to the mean of all tokens; or one of the two.

    It is SCOPE but for the projected tokens and for distinctness, which needs no attention. Ties go
    to the lowest index. It projects all N patches to choose among them.

    With `reach` a tile keeps no more picks once they cover that share of what is distinct in it:
    sum of distinctness times coverage over sum of distinctness. Then an image, and each tile of it,
    has as many tokens as that takes, from 1 to floor(keep * N) a tile. `python -m eval calibrate`
    finds the value that makes a given mean. How many stay hangs on the image alone and is known
    before the language model starts; a GPU is waited for once.
    """

    layers: tuple[int, ...] = PaperLayers((23,))
    importance: str = "both"  # or "cls" or "distinct" alone; the last runs without CLS
    reach: float | None = None  # share of distinctness to cover; None: always floor(keep * N)

    @property
    def needs_cls(self) -> bool:
        """Not where distinctness is all of the importance."""
        return self.importance != "distinct"

    @property
    def calibrated(self) -> bool:
        """Where an image decides how many stay."""
        return self.reach is not None

    def varies_by(self) -> str:
        """`reach`, where it is given."""
        return f"reach={self.reach}" if self.calibrated else ""

    def validate(self) -> None:
        """Also that there is one layer and a known importance."""
        super().validate()
        check_layers(self.layers, 1, "one layer")
        if self.importance not in IMPORTANCE:
            raise ValueError(f"importance must be one of {IMPORTANCE}, got {self.importance!r}")
        if self.reach is not None:
            check_share("reach", self.reach)

    def select(self, features: VisionFeatures) -> KeptTokens:
        """Keep the picks, in every tile as many as `keep` and `reach` say."""
        if self.reach is None:
            return super().select(features)
        return keep_mask(features, self.needed_above(features) < self.reach)

    def score(self, features: VisionFeatures) -> Tensor:
        """K for the first pick, 1 for the last, 0 for the others, (T, N)."""
        likeness, distinct = _compare(features)
        weight = finite(self._weight(features, distinct))
        return cover_greedily(likeness, weight, share(self.keep, features.n_patches))

    def needed_above(self, features: VisionFeatures) -> Tensor:
        """`reach` above which each patch stays, (T, N): infinite for those that never do."""
        likeness, distinct = _compare(features)
        weight = finite(self._weight(features, distinct))
        count = share(self.keep, features.n_patches)
        scores = cover_greedily(likeness, weight, count)
        return covered_before(likeness, distinct, scores, count)

    def _weight(self, features: VisionFeatures, distinct: Tensor) -> Tensor:
        if self.importance == "distinct":
            return distinct
        attention = cls_attention(features, *self.layers)
        return attention if self.importance == "cls" else (distinct * attention).sqrt()


def _compare(features: VisionFeatures) -> tuple[Tensor, Tensor]:
    """Cosines between projected patches, (T, N, N), and how distinct each is, (T, N)."""
    projected = features.projected()
    directions = normalize(projected, dim=-1)
    middle = normalize(projected.mean(1, keepdim=True), dim=-1)
    distinct = (1 - (directions * middle).sum(-1)).clamp(min=0)
    return finite(directions @ directions.transpose(1, 2)), distinct
