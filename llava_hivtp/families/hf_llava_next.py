"""LLaVA-NeXT as transformers has it, `llava-hf/llava-v1.6-*`: sizes are (height, width) there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    unpad_image,
)

from llava_hivtp.anyres import PackedImage, merge_anyres
from llava_hivtp.families.base import Picture
from llava_hivtp.families.hf_llava import PrunedLlavaHF
from llava_hivtp.vision import KeptTokens


class PrunedLlavaNextHF(PrunedLlavaHF):
    """AnyRes: the base tile, then rows of the unpadded whole, each with its newline."""

    def pictures(self, given: dict[str, Any]) -> list[Picture]:
        """Of pixel_values (B, T, 3, H, W), padded to the most tiles, or (sum of T, 3, H, W)."""
        pixels, sizes = self._pixels(given), given.pop("image_sizes", None)
        if sizes is None:
            raise ValueError("image_sizes is missing: pass (height, width) of every image")
        vision = self.config.vision_config
        n, points = vision.image_size // vision.patch_size, self.config.image_grid_pinpoints
        sizes = [tuple(map(int, size)) for size in sizes]
        grids = [get_anyres_image_grid_shape(size, points, vision.image_size) for size in sizes]
        counts = [1 + rows * columns for rows, columns in grids]
        pictures = []
        for tiles, count, (rows, columns), size in zip(
            _split(pixels, counts), counts, grids, sizes, strict=True
        ):
            mosaic = torch.empty(0, rows * n, columns * n)
            high, wide = frame = tuple(unpad_image(mosaic, size).shape[1:])
            places = n * n + high * (wide + 1)
            pictures.append(Picture(tiles[:count], count, (columns, rows), frame, True, places))
        return pictures

    def pack(self, tokens: Tensor, kept: KeptTokens, picture: Picture) -> PackedImage:
        """As `pack_image_features` of the stock class."""
        vision = self.config.vision_config
        n, newline = vision.image_size // vision.patch_size, self.model.image_newline
        every_row = self.layout == "inside"
        return merge_anyres(tokens, kept, n, picture.tile_grid, picture.frame, newline, every_row)


def _split(pixels: Tensor, counts: list[int]) -> list[Tensor]:
    """The tiles of every image, with more behind them where they were padded."""
    if pixels.ndim == 4 and len(pixels) == sum(counts):
        return list(pixels.split(counts))
    if pixels.ndim == 5 and len(pixels) == len(counts) and pixels.shape[1] >= max(counts):
        return list(pixels)
    raise ValueError(
        f"pixel_values of shape {tuple(pixels.shape)} for images of {counts} tiles by their "
        "image_sizes, which are (height, width)"
    )
