"""What a model and its pruner make of one image: pixels seen, importance, kept patches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from eval.figures.draw import CROPPED, DROPPED, GLOBAL, LOCAL
from llava_hivtp.anyres import PackedImage
from llava_hivtp.images import prepare_images
from llava_hivtp.importance import received_attention
from llava_hivtp.pruners import HIVTP, PRUNERS, Pruner, build_pruner
from llava_hivtp.pruners.base import PaperLayers
from llava_hivtp.vision import KeptTokens, VisionFeatures


@dataclass(frozen=True)
class Sheet:
    """Patches as they lie in the image: the whole image, or all its AnyRes tiles side by side."""

    title: str
    pixels: np.ndarray  # (H, W, 3) uint8, as the vision tower saw them
    index: np.ndarray  # (rows, columns): tile * N + patch
    inside: np.ndarray  # (rows, columns): False in the letterbox that the layout crops away
    n: int  # patches per side of a tile

    def lay(self, values: np.ndarray) -> np.ndarray:
        """(T, N) values of an image, as they lie on this sheet."""
        return values.reshape(-1)[self.index]


@dataclass(frozen=True)
class Look:
    """One image seen by the vision tower and cut down by a pruner."""

    sheets: tuple[Sheet, ...]
    stages: np.ndarray  # (T, N) of DROPPED, GLOBAL (kept, by whatever method) and LOCAL
    importance: dict[int, np.ndarray]  # layer -> (T, N), attention received
    packed: PackedImage  # what reaches the language model
    pruner: Pruner

    @property
    def names(self) -> dict[int, str]:
        """What the pruner calls the patches it keeps, by stage."""
        if not isinstance(self.pruner, HIVTP):
            return {GLOBAL: "kept"}
        one = {GLOBAL: "global stage"}
        return one if self.pruner.c is None else one | {LOCAL: "local stage"}

    def laid(self, sheet: Sheet) -> np.ndarray:
        """Stages on a sheet, CROPPED where no patch of the image lies."""
        return np.where(sheet.inside, sheet.lay(self.stages), CROPPED)


def look(model: Any, image: Image.Image, layers: Iterable[int] = ()) -> Look:
    """Run the vision tower and `model.pruner` on one image; the language model stays idle.

    `layers` asks for the importance in these encoder layers, beside those the pruner reads.
    """
    pixels, sizes = prepare_images([image], model.get_vision_tower().image_processor, model.config)
    with _watching(model, layers) as watch, torch.inference_mode():
        model.encode_images(pixels, sizes)
        return watch.look(model, pixels, sizes)


def chosen(seen: Look, kept: PackedImage | KeptTokens) -> Look:
    """The same image under another choice; stages are told apart only if the choices agree."""
    tokens = kept.kept if isinstance(kept, PackedImage) else kept
    mask = mask_of(tokens, *seen.stages.shape)
    if np.array_equal(mask, seen.stages > DROPPED):
        return seen
    packed = (
        kept
        if isinstance(kept, PackedImage)
        else replace(seen.packed, kept=kept, patches=len(kept))
    )
    return replace(seen, stages=mask.astype(np.int8), packed=packed, pruner=Pruner())


def fitted(name: str, depth: int, **arguments: Any) -> Pruner:
    """Build a method for an encoder of any depth.

    Where its default layers are a paper's, for 24, they move along: the last three keep their
    distance from the end, the others their share of the depth (7-10 of 24 are 4-5 of 12).
    """
    layers = getattr(PRUNERS[name], "layers", ())
    if isinstance(layers, PaperLayers) and depth != layers.depth and "layers" not in arguments:
        arguments["layers"] = tuple(dict.fromkeys(_moved(layer, depth) for layer in layers))
    return build_pruner(name, **arguments)


def _moved(layer: int, depth: int) -> int:
    from_end = PaperLayers.depth - layer
    if from_end < 3:
        return max(1, depth - from_end)
    return math.ceil(layer * depth / PaperLayers.depth)


def largest_hole(stages: np.ndarray) -> np.ndarray:
    """Mask of the largest set of dropped patches joined by their sides; the first of equals."""
    from scipy.ndimage import label

    holes, count = label(stages == DROPPED)
    if not count:
        return np.zeros(stages.shape, bool)
    return holes == 1 + np.bincount(holes.ravel())[1:].argmax()


def widest_hole(stages: np.ndarray) -> int:
    """Side of the largest square of dropped patches."""
    sides = np.zeros((stages.shape[0] + 1, stages.shape[1] + 1), int)  # of squares ending here
    for row, column in np.argwhere(stages == DROPPED):
        ends = sides[row, column], sides[row, column + 1], sides[row + 1, column]
        sides[row + 1, column + 1] = 1 + min(ends)
    return int(sides.max())


def mask_of(kept: KeptTokens, tiles: int, n_patches: int) -> np.ndarray:
    """(T, N) mask of the kept patches; CLS and merged tokens have no place in it."""
    mask = np.zeros((tiles, n_patches), bool)
    tile, patch = kept.tile.cpu().numpy(), kept.patch.cpu().numpy()
    mask[tile[patch >= 0], patch[patch >= 0]] = True
    return mask


@dataclass
class _Watch(Pruner):
    """Another pruner, watched: it chooses as ever, and what it read is kept for drawing."""

    inner: Pruner = field(default_factory=Pruner)
    wanted: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.layers = tuple(sorted({*self.inner.layers, *self.wanted}))
        self.seeded = self.inner.seeded

    def select(self, features: VisionFeatures) -> KeptTokens:
        """The inner pruner's choice."""
        kept = self.inner.select(features)
        stages = mask_of(kept, features.n_tiles, features.n_patches).astype(np.int8)
        if isinstance(self.inner, HIVTP):
            scores = received_attention(features, self.inner.layers)
            told = self.inner.stages(scores).cpu().numpy()
            stages[told == LOCAL] = LOCAL  # what `fill` adds is chosen by score alone: GLOBAL
        self.stages, self.tile_grid, self.n = stages, features.tile_grid, features.n
        self.importance = {
            layer: received_attention(features, (layer,)).cpu().numpy() for layer in self.wanted
        }
        return kept

    def look(self, model: Any, pixels: Any, sizes: list[tuple[int, int]]) -> Look:
        """All of it as one record, after the model has run on these pixels."""
        (pixels,), (size,), (packed,) = pixels, sizes, model.kept
        tiles = _to_rgb(pixels if pixels.ndim == 4 else pixels[None], model)
        cropped = model.layout == "unpad" and "unpad" in getattr(
            model.config, "mm_patch_merge_type", "flat"
        )
        sheets = _sheets(tiles, self.n, self.tile_grid, size if cropped else None)
        return Look(sheets, self.stages, self.importance, packed, self.inner)


@contextmanager
def _watching(model: Any, layers: Iterable[int]) -> Iterator[_Watch]:
    before, kept = model.pruner, model.kept
    model.pruner = watch = _Watch(inner=before, wanted=tuple(layers))
    try:
        yield watch
    finally:
        model.pruner, model.kept = before, kept


def _to_rgb(pixels: torch.Tensor, model: Any) -> np.ndarray:
    """Undo the normalisation: (T, 3, H, W) floats -> (T, H, W, 3) uint8."""
    processor = model.get_vision_tower().image_processor
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (processor.image_mean, processor.image_std)
    )
    rgb = (pixels.float().cpu() * std + mean).clamp(0, 1) * 255
    return rgb.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def _sheets(
    tiles: np.ndarray, n: int, tile_grid: tuple[int, int], size: tuple[int, int] | None
) -> tuple[Sheet, ...]:
    """The base tile, and the other tiles put together; `size` of the image crops its letterbox."""
    index = np.arange(len(tiles) * n * n).reshape(-1, n, n)
    base = Sheet("whole image", tiles[0], index[0], np.ones((n, n), bool), n)
    columns, rows = tile_grid
    if not columns:
        return (base,)
    mosaic = _join(index[1:, ..., None], rows, columns)[..., 0]
    inside = np.ones(mosaic.shape, bool)
    if size is not None:
        inside = np.isin(mosaic, _unpadded(mosaic, size))
    title = f"{columns} x {rows} tiles"
    return base, Sheet(title, _join(tiles[1:], rows, columns), mosaic, inside, n)


def _join(tiles: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """(rows * columns, h, w, C) -> (rows * h, columns * w, C)."""
    _, h, w, channels = tiles.shape
    grid = tiles.reshape(rows, columns, h, w, channels).swapaxes(1, 2)
    return grid.reshape(rows * h, columns * w, channels)


def _unpadded(mosaic: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    from llava.model.llava_arch import unpad_image

    return unpad_image(torch.from_numpy(mosaic)[None], size)[0].numpy()
