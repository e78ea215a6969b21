"""Cover: patches that best stand for the important ones, as the language model sees them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import normalize

from llava_hivtp.coverage import cover_greedily
from llava_hivtp.importance import cls_attention
from llava_hivtp.pruners.base import PaperLayers, ScorePruner, check_layers, finite, share
from llava_hivtp.vision import VisionFeatures

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
    """

    layers: tuple[int, ...] = PaperLayers((23,))
    importance: str = "both"  # or "cls" or "distinct" alone; the last runs without CLS

    @property
    def needs_cls(self) -> bool:
        """Not where distinctness is all of the importance."""
        return self.importance != "distinct"

    def validate(self) -> None:
        """Also that there is one layer and a known importance."""
        super().validate()
        check_layers(self.layers, 1, "one layer")
        if self.importance not in IMPORTANCE:
            raise ValueError(f"importance must be one of {IMPORTANCE}, got {self.importance!r}")

    def score(self, features: VisionFeatures) -> Tensor:
        """K for the first pick, 1 for the last, 0 for the others, (T, N)."""
        count = share(self.keep, features.n_patches)
        projected = features.projected()
        directions = normalize(projected, dim=-1)
        weight = finite(self._weight(features, projected, directions))
        likeness = finite(directions @ directions.transpose(1, 2))  # (T, N, N)
        return cover_greedily(likeness, weight, count)

    def _weight(self, features: VisionFeatures, projected: Tensor, directions: Tensor) -> Tensor:
        if self.importance == "cls":
            return cls_attention(features, *self.layers)
        middle = normalize(projected.mean(1, keepdim=True), dim=-1)
        distinct = (1 - (directions * middle).sum(-1)).clamp(min=0)
        if self.importance == "distinct":
            return distinct
        return (distinct * cls_attention(features, *self.layers)).sqrt()
