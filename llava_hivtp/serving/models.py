"""vLLM's LLaVA classes with a method between the vision tower and the projector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from vllm.model_executor.models import llava, llava_next
from vllm.multimodal import MULTIMODAL_REGISTRY

from llava_hivtp.anyres import merge_anyres
from llava_hivtp.families.base import Picture
from llava_hivtp.serving.processing import (
    llava_info,
    llava_processor,
    next_info,
    next_processor,
    tile_grid,
    unpadded,
)
from llava_hivtp.serving.settings import settings_of
from llava_hivtp.serving.tower import Chooser


class _Pruned:
    """With the key `hivtp` in the configuration images are pruned; without it nothing differs."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.settings = settings_of(self.config)
        if self.settings is None:
            return
        lora = vllm_config.lora_config
        if lora is not None and lora.enable_tower_connector_lora:
            raise ValueError("LoRA on tower or projector does not go with hivtp: leave it off")
        self.chooser = Chooser(self.settings.pruner, self.vision_tower, self.multi_modal_projector)

    def embed_multimodal(self, **inputs: Any) -> Sequence[Tensor]:
        """(L_i, D_lm) of every image; embeddings that a client made itself stay as they are."""
        if self.settings is None or inputs.get("pixel_values") is None:
            return super().embed_multimodal(**inputs)
        digests = inputs.pop("pixel_digest").flatten().tolist()
        images = self._parse_and_validate_image_input(**inputs)
        return self._embed(images, digests)


@MULTIMODAL_REGISTRY.register_processor(
    llava_processor, info=llava_info, dummy_inputs=llava.LlavaDummyInputsBuilder
)
class PrunedLlavaForConditionalGeneration(_Pruned, llava.LlavaForConditionalGeneration):
    """LLaVA-1.5: one tile an image."""

    def _embed(self, images: Any, digests: list[int]) -> Sequence[Tensor]:
        tiles = (image[None] for image in images["pixel_values"])
        pictures = [
            Picture(pixels, 1, key=digest) for pixels, digest in zip(tiles, digests, strict=True)
        ]
        return self.chooser.project(self.chooser(pictures))


@MULTIMODAL_REGISTRY.register_processor(
    next_processor, info=next_info, dummy_inputs=llava.LlavaDummyInputsBuilder
)
class PrunedLlavaNextForConditionalGeneration(
    _Pruned, llava_next.LlavaNextForConditionalGeneration
):
    """LLaVA-NeXT: tiles, put together by the layout."""

    def _embed(self, images: Any, digests: list[int]) -> Sequence[Tensor]:
        vision, by_frame = self.config.vision_config, self.settings.layout == "inside"
        n = vision.image_size // vision.patch_size
        pictures = []
        sizes = (tuple(size) for size in images["image_sizes"].tolist())  # (height, width)
        for tiles, size, digest in zip(images["pixel_values"], sizes, digests, strict=True):
            columns, rows = grid = tile_grid(self.config, *size)
            frame = unpadded(n, grid, size) if by_frame else (rows * n, columns * n)
            count = 1 + columns * rows  # a batch may be filled up with empty tiles
            pictures.append(Picture(tiles[:count], count, grid, frame, key=digest))
        chosen = self.chooser(pictures, by_frame)
        newline = self.image_newline if by_frame else None
        packed = zip(self.chooser.project(chosen), chosen, pictures, strict=True)
        return [
            merge_anyres(tokens, kept, n, at.tile_grid, at.frame, newline, by_frame).tokens
            for tokens, kept, at in packed
        ]
