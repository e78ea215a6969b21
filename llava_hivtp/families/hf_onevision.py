"""LLaVA-OneVision as transformers has it: SigLIP without CLS, AnyRes, images only."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from transformers import LlavaOnevisionProcessor

from llava_hivtp.families.base import Picture
from llava_hivtp.families.hf import PrunedHF
from llava_hivtp.families.hf_llava_next import PrunedLlavaNextHF


class ImagesOnly(LlavaOnevisionProcessor):
    """The stock processor without its part for videos, which asks for torchvision."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        """The parts that are read and saved."""
        return ["image_processor", "tokenizer"]


class PrunedOnevisionHF(PrunedLlavaNextHF):
    """One image in a prompt has tiles, several have their base tile and a newline each."""

    @staticmethod
    def check_model(model: Any) -> None:
        """As LLaVA's, where image tokens made elsewhere are taken."""
        PrunedHF.check_model(model)
        PrunedLlavaNextHF.check_model(model)

    @classmethod
    def processor(cls, path: str | Path) -> ImagesOnly:
        """For text and images."""
        return ImagesOnly.from_pretrained(path, backend="pil")

    def pictures(self, given: dict[str, Any]) -> list[Picture]:
        """As LLaVA-NeXT's; a video is refused."""
        if given.get("pixel_values_videos") is not None:
            raise ValueError("pixel_values_videos: only images can be pruned, no video")
        if given.pop("vision_aspect_ratio", None) is not None:
            raise ValueError("vision_aspect_ratio in a call is not supported; set it in the config")
        return super().pictures(given)

    def grids(self, sizes: list[tuple[int, int]], given: dict[str, Any]) -> list[tuple[int, int]]:
        """(rows, columns) of every image's sub-image tiles, (0, 0) beside other images."""
        together = given.pop("batch_num_images", None)
        together = [1] * len(sizes) if together is None else [int(count) for count in together]
        alone = [count == 1 for count in together for _ in range(count)]
        if len(alone) != len(sizes):
            raise ValueError(f"batch_num_images {together} for {len(sizes)} images")
        grids = super().grids(sizes, given)
        return [grid if own else (0, 0) for grid, own in zip(grids, alone, strict=True)]

    def frame(self, grid: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
        """As LLaVA-NeXT's; what the stock class would scale down has no patches to keep."""
        high, wide = super().frame(grid, size)
        most = int(self.config.vision_aspect_ratio.removeprefix("anyres_max_"))
        if math.sqrt(high * wide / (most * self._side**2)) > 1.1:
            raise ValueError(
                f"an image of {size[0]} x {size[1]} (height x width) fills more than "
                f"{self.config.vision_aspect_ratio}: the model would blend its patches, which "
                "cannot be pruned; hand over a smaller image"
            )
        return high, wide
