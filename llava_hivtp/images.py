"""Images as people have them, made ready for LLaVA's vision tower."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps
from torch import Tensor

from llava_hivtp.pixels import pixel_values

_LEAST = 4  # pixels; below, processors take a side for the colour channels


def open_image(source: str | Path | IO[bytes]) -> Image.Image:
    """Open an image file as RGB, upright; any mode PIL reads.

    Raises:
        ValueError: if the file is no image or is cut off, naming it.
        FileNotFoundError: if there is no such file.
    """
    try:
        with whole_files(), Image.open(source) as image:
            return to_rgb(image)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise FileNotFoundError(f"no image file at {source}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        name = getattr(source, "name", source)
        raise ValueError(f"{name} is no readable image: {error}") from error


@contextmanager
def whole_files() -> Iterator[None]:
    """Let a file that is cut off be an error; lmms-eval has PIL fill it up with grey."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn upright and convert to RGB.

    Greyscale of more than 8 bits is scaled, not clipped: 16-bit values, 32-bit integers beyond
    255, and floats up to 1.
    """
    if _is_ready(image):
        return image
    image = ImageOps.exif_transpose(image)  # a copy, even where nothing turns
    if image.mode[0] in "IF":
        values = np.nan_to_num(np.asarray(image, np.float64))
        if image.mode.startswith("I;16") or (image.mode == "I" and values.max() > 255):
            values = values // 256
        elif image.mode == "F" and values.max() <= 1:
            values = values * 255
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def _is_ready(image: Image.Image) -> bool:
    """Whether an image lies in memory, upright, as RGB: then a copy would be time lost."""
    upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    return type(image) is Image.Image and image.mode == "RGB" and upright


def prepare_images(
    images: Sequence[Image.Image], image_processor: Any, config: Any
) -> tuple[Tensor | list[Tensor], list[tuple[int, int]]]:
    """LLaVA's own preprocessing: float32 pixels on the CPU and (width, height) of each image.

    The pixels are one (B, 3, H, W) or (B, T, 3, H, W) tensor, or a list of (T_i, 3, H, W). Hand
    them to the model as they are: it casts them itself.
    """
    images = [_at_least(to_rgb(image)) for image in images]
    return pixel_values(images, image_processor, config), [image.size for image in images]


def _at_least(image: Image.Image) -> Image.Image:
    if min(image.size) >= _LEAST:
        return image
    return image.resize(tuple(max(side, _LEAST) for side in image.size))
