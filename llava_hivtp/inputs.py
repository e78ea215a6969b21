"""What a caller hands to the model, checked before the vision tower runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from llava.mm_utils import get_anyres_image_grid_shape
from torch import Tensor

ASPECTS = (None, "square", "pad", "anyres")  # what LLaVA's `process_images` tells apart


def tiles_of(images: Any) -> list[Tensor]:
    """The tiles of every image, (T_i, 3, H, W) each.

    Args:
        images: (B, 3, H, W) or (B, T, 3, H, W), or a list of (3, H, W) or (T_i, 3, H, W).

    Raises:
        TypeError: if an image is no tensor, or its pixels are not floating point.
        ValueError: if a shape is another, or there is no image.
    """
    if isinstance(images, Tensor):
        if images.ndim not in (4, 5):
            raise ValueError(f"images of shape {tuple(images.shape)}; 4 or 5 dimensions are needed")
    elif not isinstance(images, (list, tuple)):
        raise TypeError(f"images must be a tensor or a list of tensors, got {_kind(images)}")
    for i, image in enumerate(images):
        if not isinstance(image, Tensor):
            raise TypeError(
                f"image {i} must be a tensor of pixels, got {_kind(image)}; "
                "llava_hivtp.images.prepare_images makes them"
            )
        if not image.is_floating_point():
            raise TypeError(
                f"image {i} has {image.dtype} pixels; hand over the floating point pixels that "
                "the image processor gives"
            )
        if image.ndim not in (3, 4) or image.shape[-3] != 3 or 0 in image.shape:
            raise ValueError(
                f"image {i} has shape {tuple(image.shape)}; (3, H, W) or (T, 3, H, W) is needed"
            )
    tiles = [image if image.ndim == 4 else image[None] for image in images]
    if not tiles:
        raise ValueError("there is no image; pass images=None for a prompt without one")
    return tiles


def check_sizes(image_sizes: Any, count: int) -> None:
    """Raise a ValueError unless these are (width, height) of `count` images."""
    if image_sizes is None:
        raise ValueError(
            "image_sizes is missing: pass (width, height) of every image with AnyRes tiles"
        )
    if not isinstance(image_sizes, (Sequence, Tensor)) or isinstance(image_sizes, str):
        raise ValueError(f"image_sizes must be a list of (width, height), got {image_sizes!r}")
    if len(image_sizes) != count:
        raise ValueError(f"{len(image_sizes)} image_sizes for {count} images")
    for i, size in enumerate(image_sizes):
        if not _is_size(size):
            raise ValueError(
                f"image_sizes[{i}] must be (width, height), two numbers above 0; got {size!r}"
            )


def check_letterbox(tiles: Tensor, size: Any, pinpoints: Any, i: int) -> None:
    """Raise a ValueError if the black rim of AnyRes tiles says that width and height are swapped.

    The grid of tiles fits either way round. Pixels on a GPU are not looked at: that would wait.
    """
    if tiles.device.type != "cpu":
        return
    width, height = (float(side) for side in size)
    if _rim_is_plain(tiles, (width, height), pinpoints) is False and _rim_is_plain(
        tiles, (height, width), pinpoints
    ):
        raise ValueError(
            f"image {i} of size {tuple(size)} shows the letterbox of {height:g} x {width:g}: "
            "image_sizes are (width, height)"
        )


def check_aspect(config: Any, tiled: bool = False) -> None:
    """Raise a ValueError unless LLaVA's preprocessing knows the config's `image_aspect_ratio`.

    It squeezes what it does not know, such as anyres_max_9, into one square without a word.
    """
    aspect = getattr(config, "image_aspect_ratio", None)
    if tiled and aspect != "anyres":
        raise ValueError(f"image_aspect_ratio={aspect!r} with tiles: only 'anyres' is supported")
    if aspect not in ASPECTS:
        raise ValueError(f"image_aspect_ratio={aspect!r} is not supported, only {ASPECTS}")


def check_marks(marks: Sequence[int], images: Any, training: bool = False) -> None:
    """Raise a ValueError if images come without marks, or marks without images.

    A row without a mark may come with an image that nothing reads, as LLaVA's training batches
    have it; if no row has one, that is a mistake.
    """
    if images is None and sum(marks):
        raise ValueError(f"{sum(marks)} image marks in the prompts, but images=None")
    if images is not None and not training and not sum(marks):
        raise ValueError("images, but no image mark in any prompt: put <image> where it belongs")


def _rim_is_plain(tiles: Tensor, size: tuple[float, float], pinpoints: Any) -> bool | None:
    """Whether the pixels where LLaVA-NeXT pads an image of this size are all one colour.

    None if it pads nothing, or if the tiles are not of this size.
    """
    side = tiles.shape[-1]
    columns, rows = get_anyres_image_grid_shape(size, pinpoints, side)
    across, down = columns * side / size[0], rows * side / size[1]
    if columns * rows != len(tiles) - 1:
        return None
    if across < down:  # padded above and below, in whole pixels
        padding, rim = rows * side - math.ceil(size[1] * across), tiles[1 : 1 + columns, :, 0]
    else:
        padding, rim = columns * side - math.ceil(size[0] * down), tiles[1::columns, :, :, 0]
    return None if padding < 2 else bool((rim.amax((0, 2)) == rim.amin((0, 2))).all())


def _is_size(size: Any) -> bool:
    try:
        width, height = (float(side) for side in size)
    except (TypeError, ValueError, RuntimeError):
        return False
    return math.isfinite(width) and math.isfinite(height) and min(width, height) > 0


def _kind(value: Any) -> str:
    return type(value).__name__
