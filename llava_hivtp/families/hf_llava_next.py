"""LLaVA-NeXT as transformers has it, `llava-hf/llava-v1.6-*`: sizes are (height, width) there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    unpad_image,
)

from llava_hivtp.anyres import PackedImage, merge_anyres, merge_single
from llava_hivtp.families.base import Picture
from llava_hivtp.families.hf_llava import PrunedLlavaHF
from llava_hivtp.vision import KeptTokens


class PrunedLlavaNextHF(PrunedLlavaHF):
    """AnyRes: the base tile, then rows of the unpadded whole, each with its newline."""

    @property
    def aspect(self) -> str | None:
        """Always tiles."""
        return "anyres"

    def pictures(self, given: dict[str, Any]) -> list[Picture]:
        """Of pixel_values (B, T, 3, H, W), padded to the most tiles, or (sum of T, 3, H, W)."""
        pixels, sizes = self._pixels(given), given.pop("image_sizes", None)
        if sizes is None:
            raise ValueError("image_sizes is missing: pass (height, width) of every image")
        sizes = [tuple(map(int, size)) for size in sizes]
        grids = self.grids(sizes, given)
        counts = [1 + rows * columns for rows, columns in grids]
        n, pictures = self._side, []
        for tiles, count, (rows, columns), size in zip(
            _split(pixels, counts), counts, grids, sizes, strict=True
        ):
            high, wide = frame = self.frame((rows, columns), size)
            newlines = high if count > 1 else 1
            places = n * n + high * wide + newlines
            pictures.append(Picture(tiles[:count], count, (columns, rows), frame, True, places))
        return pictures

    def grids(self, sizes: list[tuple[int, int]], given: dict[str, Any]) -> list[tuple[int, int]]:
        """(rows, columns) of every image's sub-image tiles."""
        points, side = self.config.image_grid_pinpoints, self.config.vision_config.image_size
        return [get_anyres_image_grid_shape(size, points, side) for size in sizes]

    def frame(self, grid: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of sub-image patches without the letterbox."""
        rows, columns = grid
        if not rows * columns:
            return 0, 0
        mosaic = torch.empty(0, rows * self._side, columns * self._side)
        return tuple(unpad_image(mosaic, size).shape[1:])

    def pack(self, tokens: Tensor, kept: KeptTokens, picture: Picture) -> PackedImage:
        """As `pack_image_features` of the stock class."""
        n, newline = self._side, self.model.image_newline
        if picture.n_tiles == 1:
            return merge_single(tokens, kept, 1, n * n, newline)
        every_row = self.layout == "inside"
        return merge_anyres(tokens, kept, n, picture.tile_grid, picture.frame, newline, every_row)

    @property
    def _side(self) -> int:
        vision = self.config.vision_config
        return vision.image_size // vision.patch_size


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
