"""PDrop: fewer and fewer image tokens, in stages."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llava_hivtp.pruners.layered import LayerPruner, LayerState


@dataclass
class PDrop(LayerPruner):
    """Pyramid drop: rank behind every stage what the last row attends to (arXiv 2410.17247).

    Attention is that of the layer that comes next, mean over heads, from its queries and keys of
    what is still there. Positions are packed behind every stage, as in the released code. Where we
    differ from it: it refuses padding in front, which a batch that generates needs, drops from the
    first image of a row only, and takes int(keep * V) in binary fractions, where 0.29 of 100 is
    28; here it is 29.
    """

    after: tuple[int, ...] = (8, 16, 24)
    keep: tuple[float, ...] = (0.5, 0.25, 0.125)
    packed: bool = True

    def score(self, state: LayerState) -> Tensor:
        """Attention of the last row in the next layer, (B, S)."""
        return state.attention(state.last, state.layer + 1)[:, 0]
