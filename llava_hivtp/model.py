"""Official LLaVA, v1.5 and NeXT, with a pruner between its vision tower and its projector."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
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

from llava_hivtp.anyres import PackedImage, merge_anyres, merge_single
from llava_hivtp.families.base import (
    Encoded,
    Picture,
    Pruned,
    Tower,
    check_layout,
    check_positions,
)
from llava_hivtp.inputs import (
    check_aspect,
    check_letterbox,
    check_marks,
    check_sizes,
    tiles_of,
)
from llava_hivtp.pruners import LayerPruner
from llava_hivtp.questions import Question, for_images, unpadded_rows
from llava_hivtp.vision import KeptTokens, VisionFeatures, encode_tiles, view_of, without_last
from llava_hivtp.weighing import announce

MERGE_TYPES = ("flat", "spatial", "spatial_unpad")


class _Sequences(list):
    """Ready image sequences (L_i, D_lm) on their way through LLaVA's own splice."""

    ndim = 4  # LLaVA reads .ndim to choose its path; on this one it only indexes


# Pruned, an nn.Module, comes first so that Python lets an instance of the stock class change to
# this one.
class PrunedLlava(Pruned, LlavaMetaForCausalLM):
    """A LLaVA whose image tokens pass through `pruner` before they are projected."""

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

    @staticmethod
    def check_model(model: Any) -> None:
        """Refuse a missing tower, S2, and what `_depth` refuses."""
        tower = model.get_vision_tower()
        if tower is None:
            raise ValueError(
                f"{type(model).__name__} has no vision tower: it was loaded without one"
            )
        _depth(tower)
        if getattr(model.config, "s2", False):
            raise ValueError("config.s2 is set: S2 towers see several scales and cannot be pruned")
        check_aspect(model.config)

    @staticmethod
    def tower_of(model: Any) -> Tower:
        """A CLIP tower."""
        tower = model.get_vision_tower()
        return Tower(tower.config.num_hidden_layers, tower.num_patches, read=_depth(tower))

    @property
    def image_mark(self) -> int:
        """LLaVA's own, which is no word of the vocabulary."""
        return IMAGE_TOKEN_INDEX

    @property
    def image_processor(self) -> Any:
        """The tower's."""
        return self.get_vision_tower().image_processor

    @property
    def aspect(self) -> str | None:
        """As the config says."""
        return getattr(self.config, "image_aspect_ratio", None)

    def pictures(self, given: dict[str, Any]) -> list[Picture]:
        """Of `images` and `image_sizes`, as `encode_images` takes them."""
        return self._pictures(given["images"], given["image_sizes"])

    def encode_images(
        self, images: Any, image_sizes: Any = None, questions: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """Prune, project and pack: one (L_i, D_lm) sequence per image.

        Args:
            images: (B, 3, H, W), B images of one tile; or B images of (T_i, 3, H, W) or
                (3, H, W) each, as a list or stacked (AnyRes).
            image_sizes: (width, height) of each image, needed for AnyRes tiles.
            questions: token ids of the prompt of each image, for a method that asks.
        """
        if isinstance(images, _Sequences):
            return images
        asked = None if questions is None else self.embedded(questions)
        sequences, check = self._sequences(images, image_sizes, asked)
        check()
        return sequences

    def generate(self, inputs: Any = None, images: Any = None, *args: Any, **kwargs: Any) -> Any:
        """LLaVA's own `generate`, which without images would look up the image mark as a word."""
        self.check_generation(kwargs, kwargs.get("generation_config"))
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
        self.check_labels(given["labels"])
        questions = self._questions(given, marks) if self.pruner.asks else None
        sequences, check = self._sequences(given["images"], given["image_sizes"], questions)
        given["images"] = _one_per_slot(sequences, marks)
        check_positions(self.positions, self)
        kept = self.positions == "kept"  # without a mask, gaps would look like several rows
        told = kept or self.pruner.weigh or isinstance(self.pruner, LayerPruner)
        if given["attention_mask"] is None and (kept or len(given["input_ids"]) > 1):
            # Ragged rows are padded; without a mask LLaVA returns none and attends to the padding.
            given["attention_mask"] = torch.ones_like(given["input_ids"], dtype=torch.bool)
        if not training:  # which pads on the right, as the checkpoint says
            splice = super(PrunedLlava, _padding_left(self)).prepare_inputs_labels_for_multimodal
        spliced = splice(*call.args, **call.kwargs)
        if told:
            _, positions, mask, _, embeds, _ = spliced
            real = embeds.new_ones(embeds.shape[:2]) if mask is None else mask
            rows = unpadded_rows(given["input_ids"], given["attention_mask"])
            places, token = _laid_out(rows, self.kept, real.bool())
            patch = _at(token, [image.is_patch for image in self.kept], False)
            self.note_splice(token >= 0, patch, real.bool())
            if self.pruner.weigh:
                sizes = _at(token, [image.size for image in self.kept], 1.0)
                announce(self.get_decoder(), sizes)
            spliced = (None, places if kept else positions, *spliced[2:])
        check()  # the splice itself reads the prompt from the GPU: by now nothing waits
        return spliced

    def _questions(self, given: dict[str, Any], marks: list[int]) -> list[Question]:
        """The question of every image's row."""
        rows = unpadded_rows(given["input_ids"], given["attention_mask"])
        return for_images(self.asked(rows), marks, len(given["images"]))

    def _sequences(
        self, images: Any, image_sizes: Any, questions: list[Question] | None
    ) -> tuple[_Sequences, Callable[[], None]]:
        """`encode_images` without waiting for its check for NaN, which comes along."""
        pictures = self._pictures(images, image_sizes)
        if questions is not None:
            both = zip(pictures, questions, strict=True)
            pictures = [replace(picture, question=question) for picture, question in both]
        packed, check = self.prune(pictures)
        return _Sequences(image.tokens for image in packed), check

    def _pictures(self, images: Any, image_sizes: Any) -> list[Picture]:
        tiles = tiles_of(images)
        tiled = not isinstance(images, Tensor) or images.ndim == 5
        grids = self._tile_grids(tiles, image_sizes) if tiled else [(0, 0)] * len(tiles)
        check_layout(self.layout)
        merge = getattr(self.config, "mm_patch_merge_type", "flat")
        unpads = tiled and "unpad" in merge and self.layout != "mosaic"
        n = self.get_vision_tower().num_patches_per_side
        sizes = image_sizes if any(map(any, grids)) else [None] * len(tiles)
        pictures = []
        for image, grid, size in zip(tiles, grids, sizes, strict=True):
            frame = (n * grid[1], n * grid[0])
            if any(grid) and unpads:
                frame = unpadded(n, grid, size)
            pictures.append(Picture(image, len(image), grid, frame, newline=unpads))
        return pictures

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

    @torch.no_grad()
    def encode(self, pictures: list[Picture], layers: tuple[int, ...]) -> Encoded:
        """All tiles of all images in one batch."""
        tower = self.get_vision_tower()
        place = {"device": tower.device, "dtype": tower.dtype, "non_blocking": True}
        tiles = [image.pixels.to(**place) for image in pictures]
        hidden, tap = encode_tiles(tower.vision_tower, torch.cat(tiles), _depth(tower), layers)
        hidden = hidden.to(pictures[0].pixels.dtype)
        return [(VisionFeatures(hidden[:, 1:], hidden[:, 0], tap.queries, tap.keys), pictures)]

    def project(self, tokens: Tensor) -> Tensor:
        """LLaVA's own projector."""
        return _through(self.get_model().mm_projector, tokens)

    def half_project(self, tokens: Tensor) -> Tensor:
        """LLaVA's own projector without its last layer; where it is one layer the tokens stay."""
        projector = self.get_model().mm_projector
        if not isinstance(projector, nn.Sequential):
            return tokens
        return _through(without_last(projector), tokens)

    def pack(self, tokens: Tensor, kept: KeptTokens, picture: Picture) -> PackedImage:
        """As `mm_patch_merge_type` and `layout` say."""
        newline = self.get_model().image_newline if picture.newline else None
        n, grid = self.get_vision_tower().num_patches_per_side, picture.tile_grid
        if not any(grid):
            return merge_single(tokens, kept, picture.n_tiles, n * n, newline)
        every_row = self.layout == "inside"
        return merge_anyres(tokens, kept, n, grid, picture.frame, newline, every_row)


class PrunedLlavaLlamaForCausalLM(PrunedLlava, LlavaLlamaForCausalLM):
    """LLaVA-v1.5 and LLaVA-NeXT on Vicuna."""

    stock = LlavaLlamaForCausalLM


class PrunedLlavaMistralForCausalLM(PrunedLlava, LlavaMistralForCausalLM):
    """LLaVA-NeXT on Mistral."""

    stock = LlavaMistralForCausalLM


def unpadded(n: int, tile_grid: tuple[int, int], image_size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of sub-image patches without the letterbox, with LLaVA's own rounding."""
    columns, rows = tile_grid
    return tuple(unpad_image(torch.empty(0, rows * n, columns * n), image_size).shape[1:])


def _padding_left(model: PrunedLlava) -> PrunedLlava:
    """The model as its splice reads it, with padding in front: generation continues at the end."""
    view = view_of(model)
    view.config = copy.copy(model.config)
    view.config.tokenizer_padding_side = "left"
    return view


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


def _laid_out(
    rows: list[Tensor], images: Sequence[PackedImage], real: Tensor
) -> tuple[Tensor, Tensor]:
    """What the splice made of the prompts, (B, S) each.

    Positions in the unpruned prompts, 0 where there is padding; and which token of all `images`,
    one behind another, stands there, -1 for none.

    Args:
        rows: token ids of each prompt, without padding.
        images: for every mark; a row without one may have one, which is not read.
        real: (B, S) bool, no padding, as the splice returns it: a row may have been cut short.
    """
    ends = torch.tensor([len(image.tokens) for image in images]).cumsum(0).tolist()
    slots, found = zip(images, [0, *ends], strict=False), []
    places = [(row == IMAGE_TOKEN_INDEX).nonzero()[:, 0].tolist() for row in rows]
    unread = len(images) > sum(map(len, places))

    def text(start: int, end: int) -> Tensor:  # (2, text)
        place = torch.arange(start, end, device=real.device)
        return torch.stack([place, torch.full_like(place, -1)])

    for row, length, marks in zip(rows, real.sum(1).tolist(), places, strict=True):
        parts, start, before = [], 0, 0
        own = [next(slots) for _ in marks or [0] * unread]
        for mark, (image, first) in zip(marks, own, strict=False):
            parts.append(text(start, start + mark - before))
            start += mark - before
            place = start + image.place.to(real.device)
            token = torch.arange(first, first + len(place), device=real.device)
            parts.append(torch.stack([place, token]))
            start, before = start + image.span, mark + 1
        parts.append(text(start, start + len(row) - before))
        found.append(torch.cat(parts, 1)[:, :length])
    empty = torch.tensor([0, -1], device=real.device)[:, None, None].expand(2, *real.shape)
    positions, token = empty.masked_scatter(real, torch.cat(found, 1))
    return positions, token


def _at(tokens: Tensor, columns: Sequence[Tensor], default: bool | float) -> Tensor:
    """What the images' `columns`, (L,) each, say of (B, S) `tokens`; `default` where there is none.

    Tokens count through all images, -1 is none.
    """
    none = torch.tensor([default], device=tokens.device)
    return torch.cat([*(column.to(tokens.device) for column in columns), none])[tokens]


def _through(projector: nn.Module, tokens: Tensor) -> Tensor:
    """Tokens through a projector, in the dtype of its weights unless these are quantized."""
    weight = next(projector.parameters(), tokens)
    return projector(tokens.to(weight.dtype) if weight.is_floating_point() else tokens)


def _depth(tower: Any) -> int:
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
