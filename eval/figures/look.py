"""What a model and its pruner make of one image: pixels seen, importance, kept patches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from llava_hivtp.answer import prepare_pixels
from llava_hivtp.anyres import PackedImage, inside
from llava_hivtp.families.base import Picture
from llava_hivtp.importance import received_attention
from llava_hivtp.pruners import Pruner
from llava_hivtp.vision import KeptTokens, VisionFeatures

# What became of a patch. From 1 on: the stage of its method that keeps it; HIVTP has two.
CROPPED, DROPPED, GLOBAL, LOCAL = -1, 0, 1, 2
KEPT, CENTRE = 100, 101  # kept by a method without stages; others were merged into it


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
    stages: np.ndarray  # (T, N) of DROPPED, KEPT, CENTRE and the numbers of stages
    importance: dict[int, np.ndarray]  # layer -> (T, N), attention received
    packed: PackedImage  # what reaches the language model
    pruner: Pruner

    @property
    def names(self) -> dict[int, str]:
        """What the stages are called in which patches of this image were kept, in order."""
        called = dict(enumerate(self.pruner.stage_names, 1))
        called |= {KEPT: "filled up" if called else "kept", CENTRE: "merged with others"}
        return {stage: name for stage, name in called.items() if (self.stages == stage).any()}

    @property
    def unplaced(self) -> int:
        """Tokens that no patch of the picture stands for, such as CLS."""
        return int((self.packed.kept.patch < 0).sum() - (self.stages == CENTRE).sum())

    def laid(self, sheet: Sheet) -> np.ndarray:
        """Stages on a sheet, CROPPED where no patch of the image lies."""
        return np.where(sheet.inside, sheet.lay(self.stages), CROPPED)


def look(
    model: Any,
    image: Image.Image,
    layers: Iterable[int] = (),
    pruner: Pruner | None = None,
    prompt: torch.Tensor | None = None,
) -> Look:
    """Run the vision tower and a method on one image; the language model stays idle.

    Args:
        model: a LLaVA with a pruner attached; it is left as it was.
        image: any image.
        layers: encoder layers whose importance is wanted, beside those the method reads.
        pruner: the method; default `model.pruner`.
        prompt: its token ids, as `llava_hivtp.answer.prompt_ids` makes them, for methods that ask.
    """
    (picture,) = model.pictures(prepare_pixels(model, [image]))
    with _watching(model, pruner or model.pruner, layers) as watch, torch.inference_mode():
        if prompt is not None:
            (question,) = model.embedded([prompt])
            picture = replace(picture, question=question)
        _, check = model.prune([picture])
        check()
        return watch.look(model, picture)


def chosen(seen: Look, kept: PackedImage | KeptTokens) -> Look:
    """The same image under another choice; stages are told apart only if the choices agree."""
    tokens = kept.kept if isinstance(kept, PackedImage) else kept
    mask = mask_of(tokens, *seen.stages.shape)
    if np.array_equal(mask, (seen.stages > DROPPED) & (seen.stages != CENTRE)):
        return seen
    packed = (
        kept
        if isinstance(kept, PackedImage)
        else replace(seen.packed, kept=kept, patches=len(kept))
    )
    return replace(seen, stages=_as_kept(mask), packed=packed, pruner=Pruner())


def cropped_to(model: Any, size: tuple[int, int]) -> tuple[int, int] | None:
    """The middle (width, height) of an image that the preprocessing leaves of it; None: all.

    LLaVA pads an image to a square or cuts it into tiles where the checkpoint says so; else CLIP's
    processor cuts off what is beyond a square.
    """
    processor = model.image_processor
    padded = model.aspect in ("pad", "anyres")
    if padded or not processor.do_center_crop or "shortest_edge" not in processor.size:
        return None
    scale = min(size) / processor.size["shortest_edge"]
    seen = processor.crop_size["width"] * scale, processor.crop_size["height"] * scale
    left = tuple(min(side, round(most)) for side, most in zip(size, seen, strict=True))
    return None if left == tuple(size) else left


def mask_of(kept: KeptTokens, tiles: int, n_patches: int) -> np.ndarray:
    """(T, N) mask of the kept patches; CLS and merged tokens have no place in it."""
    mask = np.zeros((tiles, n_patches), bool)
    tile, patch = kept.tile.cpu().numpy(), kept.patch.cpu().numpy()
    mask[tile[patch >= 0], patch[patch >= 0]] = True
    return mask


def _as_kept(mask: np.ndarray) -> np.ndarray:
    return np.where(mask, KEPT, DROPPED).astype(np.int8)


@dataclass
class _Watch(Pruner):
    """Another pruner, watched: it chooses as ever, and what it read is kept for drawing."""

    inner: Pruner = field(default_factory=Pruner)
    wanted: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.layers = tuple(sorted({*self.inner.layers, *self.wanted}))
        self.seeded, self.asks = self.inner.seeded, self.inner.asks

    def check(self, n_layers: int, n_patches: int) -> None:
        """The inner pruner must fit, and the layers wanted must be there."""
        self.inner.check(n_layers, n_patches)
        super().check(n_layers, n_patches)

    def budget(self, n_tiles: int, n_patches: int) -> int:
        """The inner pruner's."""
        return self.inner.budget(n_tiles, n_patches)

    def select(self, features: VisionFeatures) -> KeptTokens:
        """The inner pruner's choice."""
        kept = self.inner.select(features)
        stages = _as_kept(mask_of(kept, features.n_tiles, features.n_patches))
        merged = (kept.patch < 0) & (kept.centre >= 0)
        stages[kept.tile[merged].cpu().numpy(), kept.centre[merged].cpu().numpy()] = CENTRE
        if self.inner.stage_names:
            scores = received_attention(features, self.inner.layers)
            told = self.inner.stages(scores).cpu().numpy()
            stages[told > 0] = told[told > 0]
        self.stages, self.n = stages, features.n
        self.importance = {
            layer: received_attention(features, (layer,)).cpu().numpy() for layer in self.wanted
        }
        return kept

    def look(self, model: Any, picture: Picture) -> Look:
        """All of it as one record, after the model has run on this picture."""
        (packed,) = model.kept
        sheets = _sheets(_to_rgb(picture.pixels, model.image_processor), self.n, picture)
        return Look(sheets, self.stages, self.importance, packed, self.inner)


@contextmanager
def _watching(model: Any, pruner: Pruner, layers: Iterable[int]) -> Iterator[_Watch]:
    before, kept = model.pruner, model.kept
    watch = _Watch(inner=pruner, wanted=tuple(layers))
    try:
        model.pruner = watch
        yield watch
    finally:
        model.pruner, model.kept = before, kept


def _to_rgb(pixels: torch.Tensor, processor: Any) -> np.ndarray:
    """Undo the processor's normalisation: (T, 3, H, W) floats -> (T, H, W, 3) uint8."""
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (processor.image_mean, processor.image_std)
    )
    rgb = (pixels.float().cpu() * std + mean).clamp(0, 1) * 255
    return rgb.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def _sheets(tiles: np.ndarray, n: int, picture: Picture) -> tuple[Sheet, ...]:
    """The base tile, and the other tiles put together, with what the layout shows of them."""
    index = np.arange(len(tiles) * n * n).reshape(-1, n, n)
    base = Sheet("whole image", tiles[0], index[0], np.ones((n, n), bool), n)
    columns, rows = picture.tile_grid
    if not columns:
        return (base,)
    mosaic = _join(index[1:, ..., None], rows, columns)[..., 0]
    shown = inside(n, picture.tile_grid, picture.frame).numpy().reshape(-1)[mosaic]
    title = f"{columns} x {rows} tiles"
    return base, Sheet(title, _join(tiles[1:], rows, columns), mosaic, shown, n)


def _join(tiles: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """(rows * columns, h, w, C) -> (rows * h, columns * w, C)."""
    _, h, w, channels = tiles.shape
    grid = tiles.reshape(rows, columns, h, w, channels).swapaxes(1, 2)
    return grid.reshape(rows * h, columns * w, channels)
