"""Qwen2.5-VL: any grid of patches, windows, four patches to a token, positions in 3-D; images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLProcessor
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as stock

from llava_hivtp.anyres import PackedImage
from llava_hivtp.families.base import Encoded, Picture, Tower
from llava_hivtp.families.hf import PrunedHF, check_pixels
from llava_hivtp.vision import KeptTokens, VisionFeatures, view_of, without_last


class ImagesOnly(Qwen2_5_VLProcessor):
    """The stock processor without its part for videos, which asks for torchvision."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        """The parts that are read and saved."""
        return ["image_processor", "tokenizer"]


class PrunedQwen25VL(PrunedHF):
    """Chooses among groups of 2 x 2 patches before they are merged: only survivors are projected.

    What stays keeps its position in the whole prompt, under either setting of `positions`; so does
    the text. Most layers of the tower attend within windows, where scores of different windows do
    not compare: methods read the layers that see all of the image (8, 16, 24, 32 of 32), and a
    paper's layers move to the nearest of them: HIVTP's 7-10 of 24 to 8 and 16.
    """

    @staticmethod
    def tower_of(model: Any) -> Tower:
        """How many tokens there are depends on the image; there is no CLS."""
        vision = model.config.vision_config
        everywhere = tuple(index + 1 for index in vision.fullatt_block_indexes)
        return Tower(vision.depth, None, False, everywhere)

    @classmethod
    def processor(cls, path: str | Path) -> ImagesOnly:
        """For text and images."""
        return ImagesOnly.from_pretrained(path, backend="pil")

    def pictures(self, given: dict[str, Any]) -> list[Picture]:
        """Of pixel_values (S, C), the patches of all images behind one another."""
        if given.get("pixel_values_videos") is not None:
            raise ValueError("pixel_values_videos: only images can be pruned, no video")
        for name in ("image_grid_thw", "mm_token_type_ids"):
            if given.get(name) is None:
                raise ValueError(f"{name} is missing: pass all that the processor returns")
        pixels, merge = given.pop("pixel_values"), self.config.vision_config.spatial_merge_size
        check_pixels(pixels)
        grids = given["image_grid_thw"].tolist()
        counts = [depth * rows * columns for depth, rows, columns in grids]
        if any(depth != 1 for depth, *_ in grids) or pixels.shape[:1] != (sum(counts),):
            raise ValueError(
                f"pixel_values of shape {tuple(pixels.shape)} for image_grid_thw {grids}: (1, rows,"
                " columns) of every image and as many patches are needed"
            )
        frames = [(rows // merge, columns // merge) for _, rows, columns in grids]
        return [
            Picture(part, 1, frame=(high, wide), places=high * wide)
            for part, (high, wide) in zip(pixels.split(counts), frames, strict=True)
        ]

    @torch.no_grad()
    def encode(self, pictures: list[Picture], layers: tuple[int, ...]) -> Encoded:
        """All images in one pass, as stock; each is a group of its own, because grids differ."""
        visual, merge = self.model.visual, self.config.vision_config.spatial_merge_size
        unit = merge * merge
        sides = [(1, merge * high, merge * wide) for high, wide in (p.frame for p in pictures)]
        grids = torch.tensor(sides, device=visual.device)
        back, blocks = self.reading_order(grids), list(visual.blocks)
        tapped = {layer: _Tapped(blocks[layer - 1].attn) for layer in layers}
        for layer, attention in tapped.items():
            blocks[layer - 1] = view_of(blocks[layer - 1], attn=attention)
        pixels = torch.cat([picture.pixels.to(visual.device) for picture in pictures])
        tokens = self.unmerged(nn.ModuleList(blocks), pixels.type(visual.dtype), grids)
        turned = {  # (H, S, Dh) each, in the order of the tokens
            layer: [
                part.unflatten(0, (-1, unit))[back.to(part.device)].flatten(0, 1).transpose(0, 1)
                for part in attention.taps
            ]
            for layer, attention in tapped.items()
        }
        encoded, start = [], 0
        for picture in pictures:
            end = start + picture.places
            here = slice(start * unit, end * unit)
            queries, keys = (
                {layer: pair[i][None, :, here].to(tokens.device) for layer, pair in turned.items()}
                for i in (0, 1)
            )
            own = {"grid": picture.frame, "unit": unit}
            features = VisionFeatures(tokens[None, start:end], None, queries, keys, **own)
            encoded.append((features, [picture]))
            start = end
        return encoded

    def reading_order(self, grids: Tensor) -> Tensor:
        """Where each token of all images, (S / U,), stands in the tower, which goes by windows."""
        vision = self.config.vision_config
        window, _ = stock.get_vision_window_index(
            grids, vision.spatial_merge_size, vision.window_size, vision.patch_size
        )
        return window.argsort()

    def unmerged(self, blocks: nn.ModuleList, pixels: Tensor, grids: Tensor) -> Tensor:
        """Patches (S, C) through these layers: (S / U, U * D) groups, in reading order."""
        visual = self.model.visual
        view = view_of(visual, blocks=blocks, merger=Unmerged(visual.spatial_merge_unit))
        return view(pixels, grid_thw=grids).pooler_output

    def project(self, tokens: Tensor) -> Tensor:
        """The patch merger, on groups of patches (..., U * D)."""
        return self._merged(self.model.visual.merger, tokens)

    def half_project(self, tokens: Tensor) -> Tensor:
        """The merger without its last linear layer."""
        merger = self.model.visual.merger
        return self._merged(view_of(merger, mlp=without_last(merger.mlp)), tokens)

    def _merged(self, merger: nn.Module, tokens: Tensor) -> Tensor:
        width = self.config.vision_config.hidden_size
        return merger(tokens.reshape(-1, width)).unflatten(0, tokens.shape[:-1])

    def pack(self, tokens: Tensor, kept: KeptTokens, picture: Picture) -> PackedImage:
        """In raster order, each in its own slot."""
        place, order = kept.patch.to(tokens.device).sort(stable=True)
        if len(place) and (place[0] < 0 or len(place.unique()) < len(place)):
            raise ValueError(
                f"{type(self.pruner).__name__} keeps tokens that have no position of their own in "
                "the image: merged ones, or one twice"
            )
        total, is_patch = picture.places, torch.ones_like(place, dtype=torch.bool)
        size = kept.size.to(order.device)[order]
        return PackedImage(tokens[order], kept, len(tokens), 0, total, place, total, is_patch, size)

    def slots(self, image: PackedImage) -> Tensor:
        """Those whose positions the survivors have."""
        return image.place.cpu()

    def place(self, given: dict[str, Any], marks: Tensor, stay: Tensor) -> None:
        """The positions (3, B, S) of the whole prompt, unless the call has some."""
        grids, kinds = given.pop("image_grid_thw"), given["mm_token_type_ids"]
        if given.get("position_ids") is not None:
            return
        given["position_ids"], ahead = self.model.get_rope_index(
            given["input_ids"], kinds, grids, attention_mask=given.get("attention_mask")
        )
        dropped = torch.zeros_like(marks).masked_scatter(marks, ~stay).sum(1, keepdim=True)
        self.model.rope_deltas = ahead + dropped.to(ahead.device)  # where what follows goes on

    def _kept_positions(self, *call: Any) -> None:
        """None to move: a cut prompt's tokens have their own already."""


class Unmerged(nn.Module):
    """In place of the merger: (S, D) patches to (S / U, U * D) groups."""

    def __init__(self, unit: int) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, patches: Tensor) -> Tensor:
        return patches.unflatten(0, (-1, self.unit)).flatten(1)


class _Tapped(nn.Module):
    """An attention that records its queries and keys (S, H, Dh), turned to their places."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        qkv = view_of(attention.qkv)
        qkv.register_forward_hook(self._hear)
        self.attention = view_of(attention, qkv=qkv)
        self.taps: tuple[Tensor, Tensor] | None = None

    def _hear(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self.taps = output.unflatten(1, (3, self.attention.num_heads, -1)).unbind(1)[:2]

    def forward(
        self, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any
    ) -> Tensor:
        attended = self.attention(hidden, position_embeddings=position_embeddings, **kwargs)
        self.taps = stock.apply_rotary_pos_emb_vision(*self.taps, *position_embeddings)
        return attended
