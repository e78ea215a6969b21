"""SparseVLM: the words that speak of the image rate its tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llava_hivtp.pruners.layered import LayerPruner, LayerState


@dataclass
class SparseVLM(LayerPruner):
    """Text-guided pruning in stages (arXiv 2410.04417).

    Raters are chosen once, by embeddings: every image token spreads a softmax of its dot products
    over the text behind the image, and text that gets more than the mean on average is a rater.
    Behind each stage the tokens stay to which the raters attend most in that layer, mean over heads
    and raters. Positions are packed, as in the first release.

    Where we differ from it: of what it drops it clusters 30 % into further tokens, beyond its
    budget; its second release, SparseVLM+, no longer does, nor is it done here. That one also
    divides the attention by that of equal vectors at the same positions and takes half of the
    heads, which is not done here. Its code makes whole maps, fills the mask of the batch's first
    row only, and drops one token at least. Its schedules are for 576 tokens, [300, 200, 110] "to
    192" among them, and count a stage's own layer as if it ran on what stays behind it; here `keep`
    says what stays behind each layer of `after`.
    """

    after: tuple[int, ...] = (3, 7, 16)
    keep: tuple[float, ...] = (0.5209, 0.3473, 0.191)  # 300, 200, 110 of 576
    packed: bool = True

    def score(self, state: LayerState) -> Tensor:
        """Attention of the raters, (B, S)."""
        rows = _raters(state).gather(1, state.index) & state.real
        if not rows.any():  # no image, nothing to choose
            return torch.zeros_like(rows, dtype=torch.float32)
        return state.attention(rows, state.layer).sum(1)


def _raters(state: LayerState) -> Tensor:
    """(B, S) bool of the prompt: text behind the image that its tokens are most like."""
    prompt = state.prompt
    asking = prompt.asking
    hidden = prompt.hidden.float()
    told = torch.zeros_like(asking, dtype=torch.float32)
    for row in (prompt.image.any(1) & asking.any(1)).nonzero()[:, 0].tolist():
        words, image = asking[row], prompt.image[row]
        told[row, words] = (hidden[row, image] @ hidden[row, words].T).softmax(1).mean(0)
    mean = told.sum(1, keepdim=True) / asking.sum(1, keepdim=True).clamp(min=1)
    return asking & (told > mean)
