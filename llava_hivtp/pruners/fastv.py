"""FastV: what the end of the prompt attends to in an early layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llava_hivtp.pruners.layered import LayerPruner, LayerState


@dataclass
class FastV(LayerPruner):
    """Keep what the last row of the prompt attends to most (arXiv 2403.06764).

    Attention is that of the layer behind which tokens go, mean over heads. What stays keeps its
    position. Where we differ from the released code: the image may lie anywhere in any row of a
    batch, its maps are never made, and floor(keep * V) stay of V tokens.
    """

    after: tuple[int, ...] = (2,)
    keep: tuple[float, ...] = (0.5,)

    def score(self, state: LayerState) -> Tensor:
        """Attention of the last row, (B, S)."""
        return state.attention(state.last, state.layer)[:, 0]
