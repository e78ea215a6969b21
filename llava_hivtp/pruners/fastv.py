"""FastV: what the end of the prompt attends to in an early layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llava_hivtp.pruners.layered import LayerPruner, LayerState


@dataclass
class FastV(LayerPruner):
    """Keep what the last row of the prompt attends to most (arXiv 2403.06764).

    Attention is that of the layer behind which tokens go, mean over heads. What stays keeps its
    position. Where we differ from the released code: it makes the layer's whole attention maps,
    drops in all rows of a batch what the first one attends to least, needs the image's place and
    length as settings, and keeps round((1 - r) * V) of V tokens; here each row has its own choice,
    images may lie anywhere, and floor(keep * V) stay. Its first version masks the tokens instead,
    or drops them without a cache.
    """

    after: tuple[int, ...] = (2,)
    keep: tuple[float, ...] = (0.5,)

    def score(self, state: LayerState) -> Tensor:
        """Attention of the last row, (B, S)."""
        return state.attention(state.last, state.layer)[:, 0]
