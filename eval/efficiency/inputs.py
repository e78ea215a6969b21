"""Prepared requests: a random picture and random words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from llava.constants import IMAGE_TOKEN_INDEX
from PIL import Image
from torch import Tensor

from llava_hivtp.images import prepare_images

IMAGE_AT = 2  # position of the image in the prompt


@dataclass(frozen=True)
class Inputs:
    """A prepared batch: pixels on the CPU as `prepare_images` gives them, token ids."""

    images: Tensor | list[Tensor]
    image_sizes: list[tuple[int, int]]
    prompt: Tensor  # (batch, text tokens and one image marker)

    @property
    def batch(self) -> int:
        """Equal requests at once."""
        return len(self.prompt)

    @property
    def tiles(self) -> int:
        """Per image."""
        image = next(iter(self.images))
        return 1 if image.ndim == 3 else len(image)

    @property
    def text(self) -> int:
        """Tokens per prompt, the image apart."""
        return self.prompt.shape[1] - 1


def make_inputs(model: Any, processor: Any, size: tuple[int, int], batch: int, text: int) -> Inputs:
    """Equal requests on a random picture of (width, height) with `text` random prompt tokens."""
    if text <= IMAGE_AT:
        raise ValueError(f"a prompt of {text} tokens is too short: give at least {IMAGE_AT + 1}")
    images, sizes = prepare_images([random_picture(size)], processor, model.config)
    images = images * batch if isinstance(images, list) else torch.cat([images] * batch)
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, model.config.vocab_size, text))
    prompt = torch.cat([ids[:IMAGE_AT], torch.tensor([IMAGE_TOKEN_INDEX]), ids[IMAGE_AT:]])
    return Inputs(images, sizes * batch, prompt.repeat(batch, 1).to(model.device))


def random_picture(size: tuple[int, int]) -> Image.Image:
    """Smooth colours, (width, height), the same every time."""
    coarse = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
