"""LLaVA with a pruner between its vision tower and its projector."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import get_anyres_image_grid_shape
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralForCausalLM
from llava.model.llava_arch import LlavaMetaForCausalLM, unpad_image
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from torch import Tensor, nn
from transformers import CLIPVisionModel

from llava_hivtp.anyres import LAYOUTS, PackedImage, inside, merge_anyres, merge_single
from llava_hivtp.inputs import (
    check_aspect,
    check_letterbox,
    check_marks,
    check_sizes,
    tiles_of,
)
from llava_hivtp.pruners import Pruner, build_pruner
from llava_hivtp.pruners.base import check_budget
from llava_hivtp.vision import AttentionTap, KeptTokens, VisionFeatures, encode_tiles, pixel_digest

MERGE_TYPES = ("flat", "spatial", "spatial_unpad")


class _Sequences(list):
    """Ready image sequences (L_i, D_lm) on their way through LLaVA's own splice."""

    ndim = 4  # LLaVA reads .ndim to choose its path; on this one it only indexes


# nn.Module comes first so that Python lets an instance of the stock class change to this one.
class PrunedLlava(nn.Module, LlavaMetaForCausalLM):
    """A LLaVA whose image tokens pass through `pruner` before they are projected.

    `pruner` and `layout` may be changed at any time. `kept` describes the images of the last
    call: what was chosen, how many patch tokens and newlines reach the language model.
    """

    layout = "unpad"
    kept: Sequence[PackedImage] = ()
    _pruner = Pruner()

    def __init__(self, config: Any) -> None:
        """Build the model; a tower tuned with it (LLaVA-NeXT) is filled by its checkpoint.

        Stock LLaVA loads the untuned tower here, which transformers 5 forbids while it builds a
        model without weights.
        """
        tuned = getattr(config, "unfreeze_mm_vision_tower", False)
        config.unfreeze_mm_vision_tower = False
        super().__init__(config)
        config.unfreeze_mm_vision_tower = tuned
        if tuned:
            tower = self.get_vision_tower()
            tower.vision_tower = CLIPVisionModel(tower.cfg_only).requires_grad_(False)
            tower.is_loaded = True

    @property
    def pruner(self) -> Pruner:
        """The method in use; assigning one checks that it fits the vision tower."""
        return self._pruner

    @pruner.setter
    def pruner(self, pruner: Pruner | str) -> None:
        self._pruner = _fitting(pruner, self.get_vision_tower().config)

    def encode_images(self, images: Any, image_sizes: Any = None) -> list[Tensor]:
        """Prune, project and pack: one (L_i, D_lm) sequence per image.

        Args:
            images: (B, 3, H, W), B images of one tile; or B images of (T_i, 3, H, W) or
                (3, H, W) each, as a list or stacked (AnyRes).
            image_sizes: (width, height) of each image, needed for AnyRes tiles.
        """
        if isinstance(images, _Sequences):
            return images
        sequences, check = self._prune(images, image_sizes)
        check()
        return sequences

    def _prune(self, images: Any, image_sizes: Any) -> tuple[list[Tensor], Callable[[], None]]:
        """`encode_images` without waiting for its check for NaN, which comes along."""
        tiles = tiles_of(images)
        tiled = not isinstance(images, Tensor) or images.ndim == 5
        grids = self._tile_grids(tiles, image_sizes) if tiled else [(0, 0)] * len(tiles)
        check_layout(self.layout)
        sizes = image_sizes if any(map(any, grids)) else [None] * len(tiles)
        frames = [self._frame(grid, size) for grid, size in zip(grids, sizes, strict=True)]
        chosen, check = self._choose(tiles, grids, frames)
        projected = self._project(torch.cat([kept.tokens for kept in chosen]))
        projected = projected.split([len(kept) for kept in chosen])
        self.kept = [
            self._pack(*image, tiled)
            for image in zip(projected, chosen, tiles, grids, frames, strict=True)
        ]
        return _Sequences(image.tokens for image in self.kept), check

    def generate(self, inputs: Any = None, images: Any = None, *args: Any, **kwargs: Any) -> Any:
        """LLaVA's own `generate`, which without images would look up the image mark as a word."""
        if images is None and isinstance(inputs, Tensor):
            check_marks((inputs == IMAGE_TOKEN_INDEX).sum(1).tolist(), None)
        return super().generate(inputs, images, *args, **kwargs)

    def prepare_inputs_labels_for_multimodal(self, *args: Any, **kwargs: Any) -> tuple:
        """LLaVA's own splice of text and images, fed with the survivors."""
        splice = super().prepare_inputs_labels_for_multimodal
        call = inspect.signature(splice).bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        if self.get_vision_tower() is None:
            return splice(*call.args, **call.kwargs)
        if given["input_ids"].shape[1] == 1:  # a decoding step: the images are in the cache
            return splice(*call.args, **call.kwargs)
        if set(given.get("modalities") or ["image"]) != {"image"}:
            raise ValueError(
                f"modalities {given['modalities']}: only images can be pruned, no video"
            )
        # Read before the GPU has anything to do that this would wait for.
        marks = (given["input_ids"] == IMAGE_TOKEN_INDEX).sum(1).tolist()
        training = given["labels"] is not None
        check_marks(marks, given["images"], training)
        if given["images"] is None:
            return splice(*call.args, **call.kwargs)
        sequences, check = self._prune(given["images"], given["image_sizes"])
        given["images"] = _one_per_slot(sequences, marks)
        if given["attention_mask"] is None and len(given["input_ids"]) > 1:
            # Ragged rows are padded; without a mask LLaVA returns none and attends to the padding.
            given["attention_mask"] = torch.ones_like(given["input_ids"], dtype=torch.bool)
        # Training pads on the right, as the checkpoint says.
        padding = nullcontext() if training else _left_padding(self.config)
        with padding:
            spliced = splice(*call.args, **call.kwargs)
        check()  # the splice itself reads the prompt from the GPU: by now nothing waits
        return spliced

    def _choose(
        self, tiles: list[Tensor], grids: list[tuple[int, int]], frames: list[tuple[int, int]]
    ) -> tuple[list[KeptTokens], Callable[[], None]]:
        """Run the tower once over all tiles of all images; what the method keeps of each.

        And a call that raises a ValueError naming the image if the tower did not give numbers.
        """
        tower, pruner = self.get_vision_tower(), self._pruner
        _check_fit(pruner, tower.config)  # again: its fields may have been changed since
        counts = [len(image) for image in tiles]
        hidden, tap = _encode(tower, tiles, _check_tower(tower), pruner.layers)
        check = _start_check(hidden, counts)
        every = VisionFeatures(hidden[:, 1:], hidden[:, 0], tap.queries, tap.keys, self._project)
        try:
            chosen = self._select(every, tiles, grids, frames)
            check_budget(pruner, chosen, counts, every.n_patches)
            return chosen, check
        except Exception:
            check()  # NaN may have made the method fail: then name the image
            raise

    def _select(
        self,
        every: VisionFeatures,
        tiles: list[Tensor],
        grids: list[tuple[int, int]],
        frames: list[tuple[int, int]],
    ) -> list[KeptTokens]:
        """What the method keeps of each image, of the features of all their tiles."""
        pruner, counts = self._pruner, [len(image) for image in tiles]
        by_frame = self.layout == "inside" and any(map(any, grids))
        # A subclass may choose otherwise than tile by tile: it says so itself.
        if vars(type(pruner)).get("by_tile") and not by_frame:
            return pruner.select(every).split(counts)
        chosen = []
        for part, image, grid, frame in zip(every.split(counts), tiles, grids, frames, strict=True):
            key = pixel_digest(image) if pruner.seeded else 0
            part = replace(part, key=key, tile_grid=grid)
            if by_frame and any(grid):
                chosen.append(pruner.select_inside(part, inside(part.n, grid, frame)))
            else:
                chosen.append(pruner.select(part))
        return chosen

    def _project(self, tokens: Tensor) -> Tensor:
        projector = self.get_model().mm_projector
        weight = next(projector.parameters(), tokens)
        return projector(tokens.to(weight.dtype) if weight.is_floating_point() else tokens)

    def _tile_grids(self, tiles: list[Tensor], image_sizes: Any) -> list[tuple[int, int]]:
        """(columns, rows) of every image's sub-image tiles, (0, 0) where there are none."""
        config = self.config
        merge = getattr(config, "mm_patch_merge_type", "flat")
        if merge not in MERGE_TYPES:
            raise ValueError(f"mm_patch_merge_type={merge!r} is not supported, only {MERGE_TYPES}")
        if merge == "flat" or all(len(image) == 1 for image in tiles):
            return [(0, 0)] * len(tiles)
        check_sizes(image_sizes, len(tiles))
        check_aspect(config, tiled=True)
        side = self.get_vision_tower().config.image_size
        grids = []
        for i, (image, size) in enumerate(zip(tiles, image_sizes, strict=True)):
            columns, rows = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, side)
            grids.append((columns, rows) if len(image) > 1 else (0, 0))
            if len(image) not in (1, 1 + columns * rows):
                raise ValueError(
                    f"image {i} of size {tuple(size)} has {len(image)} tiles; its grid of "
                    f"{columns} x {rows} and the base image make {1 + columns * rows}"
                )
            if len(image) > 1:
                check_letterbox(image, size, config.image_grid_pinpoints, i)
        return grids

    def _unpads(self) -> bool:
        merge = getattr(self.config, "mm_patch_merge_type", "flat")
        return "unpad" in merge and self.layout != "mosaic"

    def _frame(self, grid: tuple[int, int], size: tuple[int, int] | None) -> tuple[int, int]:
        """(rows, columns) of sub-image patches that the layout shows."""
        n, (columns, rows) = self.get_vision_tower().num_patches_per_side, grid
        return unpadded(n, grid, size) if any(grid) and self._unpads() else (rows * n, columns * n)

    def _pack(
        self,
        tokens: Tensor,
        kept: KeptTokens,
        tiles: Tensor,
        grid: tuple[int, int],
        frame: tuple[int, int],
        tiled: bool,
    ) -> PackedImage:
        merge = getattr(self.config, "mm_patch_merge_type", "flat")
        newline = self.get_model().image_newline if tiled and self._unpads() else None
        n = self.get_vision_tower().num_patches_per_side
        if len(tiles) == 1 or merge == "flat":
            return merge_single(tokens, kept, len(tiles) * n * n, newline)
        return merge_anyres(tokens, kept, n, grid, frame, newline, self.layout == "inside")


class PrunedLlavaLlamaForCausalLM(PrunedLlava, LlavaLlamaForCausalLM):
    """LLaVA-v1.5 and LLaVA-NeXT on Vicuna."""


class PrunedLlavaMistralForCausalLM(PrunedLlava, LlavaMistralForCausalLM):
    """LLaVA-NeXT on Mistral."""


def attach(model: Any, pruner: Pruner | str = "none", layout: str = "unpad") -> Any:
    """Let one loaded LLaVA prune; nothing else in the process changes. Returns the model.

    Hand it the image processor's float32 pixels: it casts them itself, and a seeded random choice
    then depends on neither dtype nor device. A model serves one call at a time.

    Args:
        model: an instance of an official LLaVA class.
        pruner: the method, or its name in PRUNERS.
        layout: how AnyRes tiles are put together. "unpad": LLaVA-NeXT's own reading order; what
            lies in the letterbox is cropped after the choice, a row that keeps a token keeps its
            newline. "inside": the same order, but the choice is among the image's patches only and
            every row keeps its newline, so the number of tokens is known before the image is seen.
            "mosaic": no unpadding, no newlines, the printed counts of the paper's Table 2.

    Raises:
        TypeError: if `model` is not an official LLaVA.
        ValueError: if its tower or the pruner's settings are not supported.
    """
    if not isinstance(model, LlavaMetaForCausalLM):
        raise TypeError(f"attach needs an official LLaVA model, got {type(model).__name__}")
    check_layout(layout)
    tower = model.get_vision_tower()
    if tower is None:
        raise ValueError(f"{type(model).__name__} has no vision tower: it was loaded without one")
    _check_tower(tower)
    if getattr(model.config, "s2", False):
        raise ValueError("config.s2 is set: S2 towers see several scales and cannot be pruned")
    check_aspect(model.config)
    pruner = _fitting(pruner, tower.config)
    if not isinstance(model, PrunedLlava):
        model.__class__ = _pruned_class(type(model))
    model._pruner, model.layout = pruner, layout
    return model


def detach(model: Any) -> Any:
    """Give the model its own class back. Returns the model."""
    if isinstance(model, PrunedLlava):
        for name in ("_pruner", "layout", "kept"):
            model.__dict__.pop(name, None)
        model.__class__ = type(model).__mro__[2]
    return model


def unpadded(n: int, tile_grid: tuple[int, int], image_size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of sub-image patches without the letterbox, with LLaVA's own rounding."""
    columns, rows = tile_grid
    return tuple(unpad_image(torch.empty(0, rows * n, columns * n), image_size).shape[1:])


def check_layout(layout: str) -> None:
    """Raise a ValueError unless the layout is known."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")


def check_pruner(pruner: Any) -> None:
    """Raise a TypeError unless it is a method."""
    if not isinstance(pruner, Pruner):
        raise TypeError(f"a Pruner or its name is needed, got {pruner!r}; 'none' keeps everything")


@functools.cache
def _pruned_class(stock: type) -> type:
    for cls in (PrunedLlavaLlamaForCausalLM, PrunedLlavaMistralForCausalLM):
        if cls.__bases__[1] is stock:
            return cls
    return type(f"Pruned{stock.__name__}", (PrunedLlava, stock), {"__module__": stock.__module__})


def _fitting(pruner: Pruner | str, tower_config: Any) -> Pruner:
    """The method, built if it is a name, after checking that it fits the tower."""
    pruner = build_pruner(pruner) if isinstance(pruner, str) else pruner
    check_pruner(pruner)
    _check_fit(pruner, tower_config)
    return pruner


def _check_fit(pruner: Pruner, tower_config: Any) -> None:
    side = tower_config.image_size // tower_config.patch_size
    pruner.check(tower_config.num_hidden_layers, side * side)


def _one_per_slot(sequences: list[Tensor], marks: list[int]) -> list[Tensor]:
    """Image sequences as LLaVA's splice takes them: a row without an image takes one, too.

    Such a row may come with an image of its own, as LLaVA's training does it, or without.
    """
    if len(sequences) == sum(max(count, 1) for count in marks):
        return sequences
    if len(sequences) != sum(marks):
        raise ValueError(f"{len(sequences)} images for {sum(marks)} image marks in the prompts")
    rest = iter(sequences)
    rows = [[next(rest) for _ in range(count)] or [sequences[0][:0]] for count in marks]
    return _Sequences(sequence for row in rows for sequence in row)


def _check_tower(tower: Any) -> int:
    """Number of encoder layers LLaVA reads; refuses towers a pruner cannot work with."""
    if type(tower) is not CLIPVisionTower:
        raise ValueError(
            f"{type(tower).__name__} is not supported: pruning needs LLaVA's CLIPVisionTower "
            "(one scale, a CLS token); S2 and other towers have none"
        )
    if tower.select_feature != "patch":
        raise ValueError(
            f"mm_vision_select_feature={tower.select_feature!r} is not supported, only 'patch'"
        )
    layers = tower.config.num_hidden_layers
    depth = tower.select_layer + (layers + 1 if tower.select_layer < 0 else 0)
    if not layers - 1 <= depth <= layers:
        raise ValueError(
            f"mm_vision_select_layer={tower.select_layer} is not supported: LLaVA reads the last "
            "(-1) or penultimate (-2) encoder layer"
        )
    return depth


@torch.no_grad()
def _encode(
    tower: CLIPVisionTower, tiles: list[Tensor], depth: int, layers: tuple[int, ...]
) -> tuple[Tensor, AttentionTap]:
    pixels = torch.cat([image.to(device=tower.device, dtype=tower.dtype) for image in tiles])
    hidden, tap = encode_tiles(tower.vision_tower, pixels, depth, layers)
    for record in (tap.queries, tap.keys):  # a tower may be spread over devices
        record.update({layer: part.to(hidden.device) for layer, part in record.items()})
    return hidden.to(tiles[0].dtype), tap


def _start_check(hidden: Tensor, tiles: list[int]) -> Callable[[], None]:
    """A call that raises a ValueError naming the image unless the tower gave numbers for all.

    From a GPU the answer is under way to the host when this returns; the call waits only if it
    has not arrived.
    """
    sound, arrived = torch.isfinite(hidden).flatten(1).all(1), None
    if sound.is_cuda:
        sound = sound.to("cpu", non_blocking=True)
        arrived = torch.cuda.current_stream(hidden.device).record_event()

    def check() -> None:
        if arrived is not None:
            arrived.synchronize()
        if False in (each := sound.tolist()):
            image_of = [i for i, count in enumerate(tiles) for _ in range(count)]
            raise ValueError(
                f"image {image_of[each.index(False)]} gives NaN or infinity in the vision tower; "
                "check its pixels, and the checkpoint's dtype"
            )

    return check


@contextmanager
def _left_padding(config: Any) -> Iterator[None]:
    """Generation continues at the end of a row, so padding belongs in front of it."""
    before = getattr(config, "tokenizer_padding_side", "right")
    config.tokenizer_padding_side = "left"
    try:
        yield
    finally:
        config.tokenizer_padding_side = before
