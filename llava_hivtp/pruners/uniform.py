"""An even grid of patches: the control that never looks at the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava_hivtp.pruners.base import ScorePruner
from llava_hivtp.vision import VisionFeatures


@dataclass
class Uniform(ScorePruner):
    """Keep floor(keep * N) patches, spread as evenly as ordered dithering spreads dots.

    Patches are taken in the order of a Bayer matrix. On an even grid, a quarter is every second
    patch of every second row and a half is a checkerboard; what lies between fills the gaps.
    """

    by_tile: ClassVar[bool] = True
    chooses_inside: ClassVar[bool] = True

    def score(self, features: VisionFeatures) -> Tensor:
        """Minus the place of each patch in the Bayer order, the same in every tile, (T, N)."""
        rows, columns = features.sides
        axis = torch.arange(max(rows, columns), device=features.tokens.device)
        y, x = axis[:rows, None], axis[None, :columns]
        place = torch.zeros_like(y * x)
        for bit in range(
            max(rows, columns).bit_length()
        ):  # low bits first: neighbours are far apart
            place = 4 * place + 2 * ((x ^ y) >> bit & 1) + (y >> bit & 1)
        return -place.flatten().float().expand(features.n_tiles, -1)
