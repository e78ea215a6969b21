"""Random patches: the control every method has to beat."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava_hivtp.pruners.base import ScorePruner
from llava_hivtp.vision import VisionFeatures


@dataclass
class Random(ScorePruner):
    """Keep floor(keep * N) random patches of every tile.

    The choice depends on `seed`, the image's pixels and the tile alone: not on the batch, the
    dtype or the device.
    """

    seed: int = 0

    seeded: ClassVar[bool] = True
    chooses_inside: ClassVar[bool] = True

    def score(self, features: VisionFeatures) -> Tensor:
        """One draw from [0, 1) per patch, made on the CPU, (T, N)."""
        draws = [self._draw(features, tile) for tile in range(features.n_tiles)]
        return torch.stack(draws).to(features.tokens.device)

    def _draw(self, features: VisionFeatures, tile: int) -> Tensor:
        state = zlib.crc32(f"{self.seed} {features.key} {tile}".encode())
        return torch.rand(features.n_patches, generator=torch.Generator().manual_seed(state))
