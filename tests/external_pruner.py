"""A method that lives outside the package."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llava_hivtp.pruners.base import Pruner, ScorePruner
from llava_hivtp.vision import KeptTokens, VisionFeatures


@dataclass
class LargestNorm(ScorePruner):
    """Keep the tokens with the largest norm."""

    power: float = 2.0

    def score(self, features: VisionFeatures) -> Tensor:
        """The norm of every token, (T, N)."""
        return features.tokens.float().norm(p=self.power, dim=-1)


@dataclass
class Unbounded(Pruner):
    """Names no share, so it may keep everything."""


@dataclass
class Failing(ScorePruner):
    """Fails when it is asked."""

    def select(self, features: VisionFeatures) -> KeptTokens:
        """Nothing."""
        raise RuntimeError("this method fails")
