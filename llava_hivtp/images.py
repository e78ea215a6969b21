"""Images as people have them, made ready for LLaVA's vision tower."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps
from torch import Tensor

from llava_hivtp.inputs import check_aspect
from llava_hivtp.limits import LEAST, Limits
from llava_hivtp.pixels import pixel_values


def open_image(source: str | Path | IO[bytes], limits: Limits = Limits()) -> Image.Image:
    """Open an image file as RGB, upright; any mode PIL reads.

    Raises:
        TypeError: if the source is neither a path nor an open file.
        ValueError: if the file is no image, is cut off or breaks a limit, naming it. What is no
            regular file, such as a pipe or a device, is not opened: it may never end.
        FileNotFoundError: if there is no such file.
    """
    if isinstance(source, (str, Path)):
        exists, plain = os.path.exists(source), os.path.isfile(source) or os.path.isdir(source)
        if exists and not plain:
            raise ValueError(f"{source} is no regular file")
    elif not hasattr(source, "read"):
        raise TypeError(f"an image is a path or an open file, got {type(source).__name__}")
    name = str(getattr(source, "name", source))
    with _naming(name):
        image = Image.open(source)
    with image:
        limits.check(image.size, name)
        with _naming(name), whole_files():
            return to_rgb(image)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Turn what PIL raises on a file into an error that names it."""
    try:
        yield
    except (FileNotFoundError, IsADirectoryError) as error:
        raise FileNotFoundError(f"no image file at {name}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} is no readable image: {error}") from error


_WHOLE = threading.Lock()
_asking = 0  # how many ask for whole files now
_before = False


@contextmanager
def whole_files() -> Iterator[None]:
    """Let a file that is cut off be an error; lmms-eval has PIL fill it up with grey.

    PIL's switch is one for all threads: it goes back when the last that asked is done.
    """
    global _asking, _before
    with _WHOLE:
        if not _asking:
            _before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        _asking += 1
    try:
        yield
    finally:
        with _WHOLE:
            _asking -= 1
            if not _asking:
                ImageFile.LOAD_TRUNCATED_IMAGES = _before


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
    images: Sequence[Image.Image], image_processor: Any, config: Any, limits: Limits = Limits()
) -> tuple[Tensor | list[Tensor], list[tuple[int, int]]]:
    """LLaVA's own preprocessing: float32 pixels on the CPU and (width, height) of each image.

    The pixels are one (B, 3, H, W) or (B, T, 3, H, W) tensor, or a list of (T_i, 3, H, W). Hand
    them to the model as they are: it casts them itself.

    Raises:
        TypeError: if an image is no PIL image.
        ValueError: if an image breaks a limit, or there is none.
    """
    check_aspect(config)
    images = fit_images(images, limits)
    return pixel_values(images, image_processor, config), [image.size for image in images]


def fit_images(images: Sequence[Image.Image], limits: Limits = Limits()) -> list[Image.Image]:
    """Images as processors take them: upright, RGB, within the limits, no thinner than LEAST.

    Raises:
        TypeError: if an image is no PIL image.
        ValueError: if an image breaks a limit, or there is none.
    """
    if not isinstance(images, (list, tuple)) or not images:
        raise ValueError(f"images must be a list of PIL images, got {images!r:.60}")
    for i, image in enumerate(images):
        if not isinstance(image, Image.Image):
            raise TypeError(
                f"image {i} must be a PIL image, got {type(image).__name__}; "
                "llava_hivtp.images.open_image reads files, PIL.Image.fromarray arrays"
            )
        limits.check(image.size, f"image {i}")
    return [_at_least(to_rgb(image)) for image in images]


def _at_least(image: Image.Image) -> Image.Image:
    if min(image.size) >= LEAST:
        return image
    return image.resize(tuple(max(side, LEAST) for side in image.size))
