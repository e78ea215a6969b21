"""CDPruner: patches that speak of the question and differ from one another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from llava_hivtp.clip_text import clip_text
from llava_hivtp.pruners.base import QuestionPruner, finite, share
from llava_hivtp.vision import VisionFeatures

TINY = 1e-6  # relevance of the least relevant patch, before scaling, as released
SPANNED = (
    1e-5  # share of its length that a patch has left where the picks span it, but for rounding
)


@dataclass
class CDPruner(QuestionPruner):
    """Conditional diversity by a determinantal point process (arXiv 2506.10967).

    Each step keeps the patch that raises the determinant of the kernel r_i cos_ij r_j most, over
    the projected tokens of the tile. The relevance r is the mean cosine of a patch to the embedded
    tokens of the question, scaled to [0, 1] over all tiles of the image.

    The released code finds the relevance with CLIP's text tower, whose cosines it negates, since
    CLIP's patches are least like what they show: `clip` names the whole CLIP that the vision tower
    is of. Without it the embedded tokens, which need no second model, are not negated. The question
    is all that stands behind the image, the template's words among it.

    Where we differ else: the code scales over the whole batch, so that an image feels its
    neighbours, and divides by zero where all relevances are equal; here they then count alike.
    Patches that the picks span already come last, by relevance. Ties go to the lowest index.
    """

    clip: str = ""  # folder or hub id of a CLIP, for the relevance by its text tower

    @property
    def reads(self) -> bool:
        """With a text tower, the question as text."""
        return bool(self.clip)

    def check(self, n_layers: int, n_patches: int | None) -> None:
        """Also that the text tower is there."""
        super().check(n_layers, n_patches)
        if self.clip:
            clip_text(self.clip)

    def score(self, features: VisionFeatures) -> Tensor:
        """K for the first pick, 1 for the last, 0 for the others, (T, N)."""
        directions = normalize(features.projected(), dim=-1)
        return most_diverse(
            directions,
            scaled(self.relevance(directions, features)),
            share(self.keep, features.n_patches),
        )

    def relevance(self, directions: Tensor, features: VisionFeatures) -> Tensor:
        """Mean cosine of (T, N, D_lm) directions to the question, (T, N); by CLIP, its negative."""
        if self.clip:
            clip = clip_text(self.clip)
            seen = normalize(clip.patches(features.tokens), dim=-1)
            read = normalize(clip.text(features.text, seen.device), dim=-1)
            return -(seen @ read.T).mean(2)
        asked = normalize(features.question.to(directions), dim=-1)
        return (directions @ asked.T).mean(2)


def scaled(relevance: Tensor) -> Tensor:
    """Relevance of all patches of an image, from nearly 0 to 1."""
    least = finite(relevance).min()
    return (relevance - least + TINY) / (relevance.max() - least).clamp(min=TINY)


def most_diverse(directions: Tensor, relevance: Tensor, count: int) -> Tensor:
    """`CDPruner.score` of (T, N, D) directions of length 1 with (T, N) relevance, from 0."""
    cosines = finite(directions @ directions.transpose(1, 2))
    kernel = relevance[:, :, None] * cosines * relevance[:, None]
    size = kernel.diagonal(dim1=1, dim2=2)
    left = size.clone()  # what no pick spans, (T, N)
    rows = kernel.new_zeros(count, *size.shape)  # of the Cholesky factor, one a pick
    scores = torch.zeros_like(size)
    tiles = torch.arange(len(size), device=size.device)
    for step in range(count):
        new = left > SPANNED * size
        gain = torch.where(new, left, relevance - relevance.max() - 1)
        pick = gain.masked_fill(scores > 0, -torch.inf).argmax(1)
        spanned = torch.einsum("kt,ktn->tn", rows[:step, tiles, pick], rows[:step])
        length = left[tiles, pick].clamp(min=torch.finfo(left.dtype).tiny).sqrt()
        row = (kernel[tiles, pick] - spanned) / length[:, None]
        rows[step] = torch.where(new[tiles, pick][:, None], row, 0)
        left = left - rows[step].square()
        scores[tiles, pick] = count - step
    return scores
