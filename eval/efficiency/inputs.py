"""Prepared requests: a random picture and random words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from eval.untrained.shapes import text_config
from llava_hivtp import attach
from llava_hivtp.answer import prepare_pixels

IMAGE_AT = 2  # position of the image in the prompt


@dataclass(frozen=True)
class Inputs:
    """A prepared batch: token ids, and the images as `prepare_pixels` gives them, on the CPU."""

    given: dict[str, Any]  # pixels and sizes, arguments of `generate`
    prompt: Tensor  # (batch, text tokens and the image's marks)
    text: int  # tokens per prompt, the image apart
    tiles: int  # per image

    @property
    def batch(self) -> int:
        """Equal requests at once."""
        return len(self.prompt)


def make_inputs(model: Any, size: tuple[int, int], batch: int, text: int) -> Inputs:
    """Equal requests on a random picture of (width, height) with `text` random prompt tokens."""
    if text <= IMAGE_AT:
        raise ValueError(f"a prompt of {text} tokens is too short: give at least {IMAGE_AT + 1}")
    attach(model)  # a stock class does not say how it is asked
    given = prepare_pixels(model, [random_picture(size)])
    (picture,) = model.pictures(dict(given))
    mark, words = model.image_mark, text_config(model).vocab_size
    words = min(words, mark) if mark > 0 else words  # the mark may be the last of them
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, words, text))
    marks = torch.full((picture.places or 1,), mark)
    prompt = torch.cat([ids[:IMAGE_AT], marks, ids[IMAGE_AT:]])
    given = {
        name: value * batch if isinstance(value, list) else torch.cat([value] * batch)
        for name, value in given.items()
    }
    prompt = prompt.repeat(batch, 1).to(model.device)
    return Inputs(given, prompt, text, picture.n_tiles)


def random_picture(size: tuple[int, int]) -> Image.Image:
    """Smooth colours, (width, height), the same every time."""
    coarse = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
