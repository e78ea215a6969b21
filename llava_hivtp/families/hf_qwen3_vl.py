"""Qwen3-VL: as Qwen2.5-VL, without windows, with features of earlier layers of the tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3VLProcessor
from transformers.models.qwen3_vl import modeling_qwen3_vl as stock

from llava_hivtp.anyres import PackedImage
from llava_hivtp.families.base import Tower
from llava_hivtp.families.hf_qwen2_5_vl import PrunedQwen25VL, Unmerged
from llava_hivtp.vision import view_of


class ImagesOnly(Qwen3VLProcessor):
    """The stock processor without its part for videos, which asks for torchvision."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        """The parts that are read and saved."""
        return ["image_processor", "tokenizer"]


class PrunedQwen3VL(PrunedQwen25VL):
    """All layers of the tower see the whole image: HIVTP's 7-10 of 24 are 8, 9, 11, 12 of 27.

    The tower hands over the patches of some earlier layers, too (DeepStack): each layer's go
    through a merger of its own and are added behind one of the language model's first layers. A
    method chooses by the last layer's; of the earlier ones those at the same places stay.
    """

    @staticmethod
    def tower_of(model: Any) -> Tower:
        """How many tokens there are depends on the image; there is no CLS."""
        depth = model.config.vision_config.depth
        return Tower(depth, None, False, tuple(range(1, depth + 1)))

    @classmethod
    def processor(cls, path: str | Path) -> ImagesOnly:
        """For text and images."""
        return ImagesOnly.from_pretrained(path, backend="pil")

    def reading_order(self, grids: Tensor) -> Tensor:
        """Where each token of all images stands in the tower: as it is read."""
        count = int(grids.prod(1).sum()) // self.model.visual.spatial_merge_unit
        return torch.arange(count, device=grids.device)

    def unmerged(self, blocks: nn.ModuleList, pixels: Tensor, grids: Tensor) -> Tensor:
        """Patches (S, C) through these layers: (S / U, U * D) groups; the earlier ones are kept."""
        visual = self.model.visual
        group = Unmerged(visual.spatial_merge_unit)
        earlier = nn.ModuleList([group] * len(visual.deepstack_merger_list))
        view = view_of(visual, blocks=blocks, merger=group, deepstack_merger_list=earlier)
        output = view(pixels, grid_thw=grids)
        self._of_thread.earlier = output.deepstack_features
        return output.pooler_output

    def half_project(self, tokens: Tensor) -> Tensor:
        """The merger without its last linear layer."""
        merger = self.model.visual.merger
        return self._merged(view_of(merger, linear_fc2=nn.Identity()), tokens)

    def encoder_outputs(self, packed: list[PackedImage]) -> Any:
        """The survivors, and what the tower's earlier layers say of the same places."""
        earlier, self._of_thread.earlier = self._of_thread.earlier, None
        places, start = [], 0
        for image in packed:
            places.append(start + image.place)
            start += image.total
        chosen, counts = torch.cat(places), [len(place) for place in places]
        mergers = self.model.visual.deepstack_merger_list
        return stock.BaseModelOutputWithDeepstackFeatures(
            pooler_output=[image.tokens for image in packed],
            deepstack_features=[
                merger(groups[chosen]).split(counts)
                for merger, groups in zip(mergers, earlier, strict=True)
            ],
        )
