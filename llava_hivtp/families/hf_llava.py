"""LLaVA-v1.5 as transformers has it, `llava-hf/llava-1.5-*`, on CLIP or SigLIP towers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llava_hivtp.anyres import PackedImage, merge_single
from llava_hivtp.families.base import Encoded, Picture, Tower
from llava_hivtp.families.hf import PrunedHF, check_pixels
from llava_hivtp.vision import KeptTokens, VisionFeatures, encode_tiles, view_of

_STRATEGY = {"clip_vision_model": "default", "siglip_vision_model": "full"}


class PrunedLlavaHF(PrunedHF):
    """One tile per image: all its patches behind one another."""

    @staticmethod
    def check_model(model: Any) -> None:
        """Refuse towers and strategies that leave no square grid of patches."""
        kind = model.config.vision_config.model_type
        strategy = model.config.vision_feature_select_strategy
        layer, layers = _layer(model), model.config.vision_config.num_hidden_layers
        if kind not in _STRATEGY:
            raise ValueError(f"the vision tower is a {kind}; supported are {', '.join(_STRATEGY)}")
        if strategy != _STRATEGY[kind]:
            raise ValueError(
                f"vision_feature_select_strategy={strategy!r} is not supported on a {kind}, only "
                f"{_STRATEGY[kind]!r}"
            )
        if not isinstance(layer, int) or not layers - 1 <= layer <= layers:
            raise ValueError(
                f"vision_feature_layer={model.config.vision_feature_layer} is not supported: only "
                "the last (-1) or penultimate (-2) layer"
            )

    @staticmethod
    def tower_of(model: Any) -> Tower:
        """A CLIP or SigLIP tower."""
        vision = model.config.vision_config
        cls = vision.model_type == "clip_vision_model"
        return Tower(vision.num_hidden_layers, _side(model) ** 2, cls, read=_layer(model))

    @property
    def aspect(self) -> str | None:
        """As the processor is set."""
        return "pad" if getattr(self.image_processor, "do_pad", None) else None

    def pictures(self, given: dict[str, Any]) -> list[Picture]:
        """Of pixel_values (B, 3, H, W)."""
        pixels = self._pixels(given)
        if pixels.ndim != 4:
            raise ValueError(f"pixel_values of shape {tuple(pixels.shape)}; (B, 3, H, W) is needed")
        return [Picture(image[None], 1, places=_side(self) ** 2) for image in pixels]

    def _pixels(self, given: dict[str, Any]) -> Tensor:
        for name in ("vision_feature_layer", "vision_feature_select_strategy"):
            own = given.pop(name, None)
            if own not in (None, getattr(self.config, name)):
                raise ValueError(f"{name}={own!r} in a call is not supported; set it in the config")
        check_pixels(given["pixel_values"])
        return given.pop("pixel_values")

    @torch.no_grad()
    def encode(self, pictures: list[Picture], layers: tuple[int, ...]) -> Encoded:
        """All tiles of all images in one batch."""
        tower = self.model.vision_tower
        place = {"device": tower.device, "dtype": tower.dtype, "non_blocking": True}
        pixels = torch.cat([picture.pixels.to(**place) for picture in pictures])
        hidden, tap = encode_tiles(tower, pixels, _layer(self), layers)
        cls, patches = None, hidden
        if self.tower_of(self).cls:
            cls, patches = hidden[:, 0], hidden[:, 1:]
        return [(VisionFeatures(patches, cls, tap.queries, tap.keys), pictures)]

    def project(self, tokens: Tensor) -> Tensor:
        """The checkpoint's projector."""
        return self.model.multi_modal_projector(tokens)

    def half_project(self, tokens: Tensor) -> Tensor:
        """The same without `linear_2`."""
        return view_of(self.model.multi_modal_projector, linear_2=nn.Identity())(tokens)

    def pack(self, tokens: Tensor, kept: KeptTokens, picture: Picture) -> PackedImage:
        """One tile, no newline."""
        return merge_single(tokens, kept, 1, _side(self) ** 2, None)


def _side(model: Any) -> int:
    vision = model.config.vision_config
    return vision.image_size // vision.patch_size


def _layer(model: Any) -> Any:
    """Number of encoder layers that are read; a list of layers stays one."""
    layer = model.config.vision_feature_layer
    if isinstance(layer, int) and layer < 0:
        return model.config.vision_config.num_hidden_layers + 1 + layer
    return layer
