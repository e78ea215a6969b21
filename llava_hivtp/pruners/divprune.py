"""DivPrune: keep the patches that are farthest from one another."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import normalize

from llava_hivtp.farthest import farthest_first
from llava_hivtp.pruners.base import ScorePruner, finite, share
from llava_hivtp.vision import VisionFeatures


@dataclass
class DivPrune(ScorePruner):
    """Greedy max-min diversity of the projected tokens (arXiv 2503.02175).

    The first pick is the patch whose nearest neighbour is farthest by 1 - cosine, each next one
    the patch farthest from its nearest pick. It projects all N patches to choose among them.

    Where we differ from the released code: it runs over a whole LLaVA-NeXT image, row breaks
    included, and rounds keep * N; here every tile keeps floor(keep * N). A patch is never picked
    twice, even if all that is left equals a pick.
    """

    def score(self, features: VisionFeatures) -> Tensor:
        """K for the first pick, 1 for the last, 0 for the others, (T, N)."""
        count = share(self.keep, features.n_patches)
        directions = normalize(features.projected(), dim=-1)
        distance = finite(1 - directions @ directions.transpose(1, 2))  # (T, N, N)
        nearest = distance.kthvalue(2).values  # the nearest is the patch itself
        return farthest_first(distance, nearest, count)
