"""LLaVA's own preprocessing, to the bit, in little more than the time of its resizes.

LLaVA hands every tile to the image processor by itself, which copies it many times on the way to
three small steps: byte / 255, minus the mean, over the deviation. Here they are done in place, tile
by tile. Whether they give the processor's own bits is asked once, for every byte of every channel;
a processor of other bits or other steps is left to LLaVA.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from llava.mm_utils import expand2square, process_images, select_best_resolution
from PIL import Image
from torch import Tensor

_BICUBIC = Image.Resampling.BICUBIC
_STRIP = 256  # rows that are padded at a time


def pixel_values(
    images: Sequence[Image.Image], processor: Any, config: Any
) -> Tensor | list[Tensor]:
    """What LLaVA's `process_images` gives for RGB images: equal bits.

    Returns:
        float32 on the CPU: one (B, 3, H, W) or, cut into tiles, (B, T, 3, H, W) tensor, or a list
        of (T_i, 3, H, W) where images have different numbers of tiles.
    """
    steps = _steps(processor)
    if steps is None:
        return process_images(images, processor, config)
    mode = getattr(config, "image_aspect_ratio", None)
    if mode == "anyres":
        return _tiled(images, config.image_grid_pinpoints, steps)
    grey, side = tuple(int(255 * mean) for mean in processor.image_mean), steps.side
    values = torch.empty(len(images), 3, side, side)
    for image, out in zip(images, values, strict=True):
        padded = mode == "pad"
        steps.write(_squared(image, grey, side) if padded else _cropped(image, side), out)
    return values


@dataclass(frozen=True)
class _Steps:
    """What CLIP's processor makes of a tile of `side` pixels a side."""

    side: int
    divisor: float
    mean: Tensor  # (3, 1, 1), as is std
    std: Tensor

    def write(self, tile: Sequence[np.ndarray], out: Tensor) -> None:
        """Three planes of bytes, (H, W) each, to floats (3, H, W)."""
        for plane, own in zip(tile, out.numpy(), strict=True):
            own[:] = plane
        out.div_(self.divisor).sub_(self.mean).div_(self.std)

    def write_part(self, image: Sequence[np.ndarray], y: int, x: int, out: Tensor) -> None:
        """The tile whose corner is row y, column x of an image; black outside the image."""
        top, left = max(0, -y), max(0, -x)
        height, width = image[0].shape
        bottom, right = min(self.side, height - y), min(self.side, width - x)
        if (top, left, bottom, right) != (0, 0, self.side, self.side):
            out.copy_((0 - self.mean) / self.std)
        if top < bottom and left < right:
            part = [plane[y + top : y + bottom, x + left : x + right] for plane in image]
            self.write(part, out[:, top:bottom, left:right])


_KNOWN: dict[tuple, _Steps | None] = {}


def _steps(processor: Any) -> _Steps | None:
    """The steps of a processor, if they are these to the bit."""
    if not _is_clip(processor):
        return None
    side, factor = processor.crop_size["height"], processor.rescale_factor
    key = (type(processor), side, factor, *processor.image_mean, *processor.image_std)
    if key not in _KNOWN:
        mean, std = (
            torch.tensor(v).view(3, 1, 1) for v in (processor.image_mean, processor.image_std)
        )
        steps = _Steps(side, 1 / factor, mean, std)
        _KNOWN[key] = steps if _agree(steps, processor) else None
    return _KNOWN[key]


def _agree(steps: _Steps, processor: Any) -> bool:
    """Whether every byte becomes the processor's own float in every channel."""
    side = steps.side
    tiles = np.resize(np.arange(256, dtype=np.uint8), (math.ceil(256 / side**2), 1, side, side))
    for tile in tiles.repeat(3, axis=1):
        image = Image.fromarray(np.ascontiguousarray(tile.transpose(1, 2, 0)))
        theirs = processor.preprocess(image, return_tensors="pt")["pixel_values"]
        ours = torch.empty(3, side, side)
        steps.write(tile, ours)
        if not torch.equal(ours, theirs[0]):
            return False
    return True


def _is_clip(processor: Any) -> bool:
    """Whether a processor does what CLIP's does: to the shortest side, the middle, normalized."""
    steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
    size, crop = (dict(getattr(processor, name, None) or {}) for name in ("size", "crop_size"))
    side = crop.get("height")
    return (
        all(getattr(processor, step, False) for step in steps)
        and {name: value for name, value in size.items() if value} == {"shortest_edge": side}
        and crop.get("width") == side
        and processor.resample == _BICUBIC
    )


def _tiled(images: Sequence[Image.Image], pinpoints: Any, steps: _Steps) -> Tensor | list[Tensor]:
    """Each image whole, then its tiles row by row."""
    side = steps.side
    pinpoints = pinpoints if isinstance(pinpoints, list) else ast.literal_eval(pinpoints)
    best = [select_best_resolution(image.size, pinpoints) for image in images]
    grids = [(math.ceil(width / side), math.ceil(height / side)) for width, height in best]
    counts = [1 + columns * rows for columns, rows in grids]
    values = torch.empty(sum(counts), 3, side, side).split(counts)
    for image, size, (columns, _), out in zip(images, best, grids, values, strict=True):
        steps.write(_resized(image, (side, side)), out[0])
        resized, top, left = _fitted(image, size)
        for i, tile in enumerate(out[1:]):
            y, x = side * (i // columns) - top, side * (i % columns) - left
            steps.write_part(resized, y, x, tile)
    if len(set(counts)) == 1:
        return values[0].as_strided(
            (len(images), counts[0], 3, side, side),
            (counts[0] * 3 * side**2, 3 * side**2, side**2, side, 1),
        )
    return list(values)


def _fitted(image: Image.Image, size: tuple[int, int]) -> tuple[list[np.ndarray], int, int]:
    """The image as large as fits `size`, in planes, and the rows above and columns before."""
    (width, height), (w, h) = size, image.size
    if width / w < height / h:
        new = width, min(math.ceil(h * (width / w)), height)
    else:
        new = min(math.ceil(w * (height / h)), width), height
    return _resized(image, new), (height - new[1]) // 2, (width - new[0]) // 2


def _squared(image: Image.Image, background: tuple[int, ...], side: int) -> list[np.ndarray]:
    """An image padded to a square and scaled to `side`, without the square in memory.

    Scaling runs along the rows first, then along the columns. So a strip of padded rows can be
    scaled at a time, and rows of padding alone stay what they are.
    """
    longer = max(image.size)
    if longer <= side or image.size[0] == image.size[1]:
        return _resized(expand2square(image, background), (side, side))
    left, top = (longer - image.size[0]) // 2, (longer - image.size[1]) // 2
    narrow = Image.new("RGB", (side, longer), background)
    for start in range(0, image.size[1], _STRIP):
        rows = image.crop((0, start, image.size[0], min(start + _STRIP, image.size[1])))
        strip = Image.new("RGB", (longer, rows.size[1]), background)
        strip.paste(rows, (left, 0))
        narrow.paste(strip.resize((side, rows.size[1]), _BICUBIC), (0, top + start))
    return _resized(narrow, (side, side))


def _cropped(image: Image.Image, side: int) -> list[np.ndarray]:
    """The shorter side made `side`, then the middle of the longer one."""
    w, h = image.size
    long = int(side * max(w, h) / min(w, h))
    resized = _resized(image, (side, long) if w <= h else (long, side))
    y, x = ((length - side) // 2 for length in resized[0].shape)
    return [plane[y : y + side, x : x + side] for plane in resized]


def _resized(image: Image.Image, size: tuple[int, int]) -> list[np.ndarray]:
    """Three planes of bytes, (H, W) each: Pillow takes channels apart faster than numpy does."""
    return [np.asarray(band) for band in image.resize(size, _BICUBIC).split()]
