"""Which of a prompt's tokens are the question about its images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Question:
    """What a row asks about its images."""

    embedded: Tensor  # (Q, D_lm)
    text: str = ""  # for a method that reads it


def question_of(row: Tensor, image_mark: int) -> Tensor:
    """(Q,) token ids behind the last image of an unpadded prompt (S,).

    Where no text follows it, or there is no image, all of the prompt's text.
    """
    marks = (row == image_mark).nonzero()
    behind = row[int(marks[-1]) + 1 :] if len(marks) else row
    return behind if len(behind) else row[row != image_mark]


def for_images(questions: Sequence[Question], marks: Sequence[int], images: int) -> list[Question]:
    """The question of its row for each image, given every row's question and number of marks.

    A row without a mark may have an image of its own, as LLaVA's training puts it there.

    Raises:
        ValueError: if there are more or fewer images than marks.
    """
    if images not in (sum(marks), sum(max(count, 1) for count in marks)):
        raise ValueError(f"{images} images for {sum(marks)} image marks in the prompts")
    least = int(images != sum(marks))
    counts = [max(count, least) for count in marks]
    return [question for question, n in zip(questions, counts, strict=True) for _ in range(n)]


def unpadded_rows(ids: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Rows of (B, S) token ids, each without its padding."""
    mask = torch.ones_like(ids) if mask is None else mask
    return [row[real.bool()] for row, real in zip(ids, mask, strict=True)]
