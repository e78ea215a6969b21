"""What vLLM asks before the engine runs: how many tokens an image takes, and its cache key."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape
from vllm.model_executor.models import llava, llava_next
from vllm.multimodal.inputs import MultiModalFieldConfig

from llava_hivtp.serving.settings import Settings, room_for, settings_of
from llava_hivtp.vision import pixel_digest


class LlavaInfo(llava.LlavaProcessingInfo):
    """LLaVA-1.5: every image is one tile."""

    @functools.cached_property
    def settings(self) -> Settings:
        """From the checkpoint's configuration."""
        return settings_of(self.get_hf_config())

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        """How many tokens of an image stay."""
        size = {"image_width": image_width, "image_height": image_height}
        return self.settings.pruner.budget(1, super().get_num_image_tokens(**size))

    def tiles(self, height: int, width: int) -> int:
        """Tiles of an image of this size."""
        return 1


class LlavaNextInfo(llava_next.LlavaNextProcessingInfo):
    """LLaVA-NeXT: a base tile, and tiles by the size of the image."""

    @functools.cached_property
    def settings(self) -> Settings:
        """From the checkpoint's configuration."""
        return settings_of(self.get_hf_config())

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        """How many tokens of an image stay, row breaks included."""
        n, pruner = self.get_vision_encoder_info().get_patch_grid_length(), self.settings.pruner
        grid = tile_grid(self.get_hf_config(), image_height, image_width)
        if self.settings.layout == "mosaic":
            return room_for(pruner, n, grid, None)
        frame = unpadded(n, grid, (image_height, image_width))
        return room_for(pruner, n, grid, frame) + frame[0]

    def tiles(self, height: int, width: int) -> int:
        """Tiles of an image of this size."""
        columns, rows = tile_grid(self.get_hf_config(), height, width)
        return 1 + columns * rows


def tile_grid(config: Any, height: int, width: int) -> tuple[int, int]:
    """(columns, rows) of the sub-image tiles of an image."""
    side = config.vision_config.image_size
    rows, columns = get_anyres_image_grid_shape((height, width), config.image_grid_pinpoints, side)
    return columns, rows


def unpadded(n: int, grid: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of patches without the letterbox, with the rounding of transformers."""
    columns, rows = grid
    empty = torch.empty(0, rows * n, columns * n)
    return tuple(llava_next.unpad_image(empty, size).shape[1:])


class _Processor:
    """Cache keys that know the method, pixels that are numbers, digests before any cast."""

    def _get_mm_hashes(self, inputs: Any) -> dict[str, list[str]]:
        """Stock keys hold checkpoint and pixels; the image's tokens depend on the method, too."""
        key = self.info.settings.key
        hashes = super()._get_mm_hashes(inputs)
        return {modality: [f"{own}-{key}" for own in each] for modality, each in hashes.items()}

    def _get_mm_fields_config(self, hf_inputs: BatchFeature, *arguments: Any) -> dict:
        fields = super()._get_mm_fields_config(hf_inputs, *arguments)
        digest = MultiModalFieldConfig.batched("image", keep_on_cpu=True)
        return {**fields, "pixel_digest": digest}

    def _call_hf_processor(
        self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]
    ) -> BatchFeature:
        processor = self.info.get_hf_processor(**hf_kwargs)

        @functools.wraps(processor)
        def digested(**arguments: Any) -> BatchFeature:
            output = processor(**arguments)
            output["pixel_digest"] = self._digests(output)
            return output

        # vLLM casts to the model's dtype in here.
        output = self.info.ctx.call_hf_processor(digested, hf_data, hf_kwargs)
        for i, pixels in enumerate(output["pixel_values"]):
            if not torch.isfinite(pixels).all():
                raise ValueError(f"image {i} holds NaN or infinity: check its pixels")
        return output

    def _digests(self, output: BatchFeature) -> Tensor:
        images = list(output["pixel_values"])
        if not self.info.settings.pruner.seeded:
            return torch.zeros(len(images), dtype=torch.int64)
        if "image_sizes" in output:  # the tiles of a batch are filled up with empty ones
            sizes = output["image_sizes"].tolist()
            counts = [self.info.tiles(*size) for size in sizes]
            images = [image[:count] for image, count in zip(images, counts, strict=True)]
        return torch.tensor([pixel_digest(image) for image in images])


class LlavaProcessor(_Processor, llava.LlavaMultiModalProcessor):
    """LLaVA-1.5."""


class LlavaNextProcessor(_Processor, llava_next.LlavaNextMultiModalProcessor):
    """LLaVA-NeXT."""


def llava_info(ctx: Any) -> llava.BaseLlavaProcessingInfo:
    """Stock vLLM's, unless the configuration has the key `hivtp`."""
    asked = settings_of(ctx.get_hf_config()) is not None
    return LlavaInfo(ctx) if asked else llava._build_llava_or_pixtral_hf_info(ctx)


def llava_processor(info: Any, dummy_inputs: Any) -> Any:
    """Stock vLLM's, unless the configuration has the key `hivtp`."""
    if isinstance(info, LlavaInfo):
        return LlavaProcessor(info, dummy_inputs)
    return llava._build_llava_or_pixtral_hf_processor(info, dummy_inputs)


def next_info(ctx: Any) -> llava_next.LlavaNextProcessingInfo:
    """Stock vLLM's, unless the configuration has the key `hivtp`."""
    asked = settings_of(ctx.get_hf_config()) is not None
    return (LlavaNextInfo if asked else llava_next.LlavaNextProcessingInfo)(ctx)


def next_processor(info: Any, dummy_inputs: Any) -> Any:
    """Stock vLLM's, unless the configuration has the key `hivtp`."""
    asked = isinstance(info, LlavaNextInfo)
    return (LlavaNextProcessor if asked else llava_next.LlavaNextMultiModalProcessor)(
        info, dummy_inputs
    )
