"""Shapes of the published LLaVA checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Encoder:
    """A CLIP vision tower."""

    width: int = 1024
    mlp: int = 4096
    layers: int = 24
    heads: int = 16
    side: int = 336  # of a tile, in pixels
    patch: int = 14  # side of a patch, in pixels

    @property
    def patches(self) -> int:
        """N, patches per tile."""
        return (self.side // self.patch) ** 2


@dataclass(frozen=True)
class Shape:
    """A LLaVA: language model, tower, and whether images are cut into tiles."""

    width: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int = 32000
    anyres: bool = False
    mistral: bool = False
    tower: Encoder = Encoder()

    @property
    def kv_width(self) -> int:
        """Width of the keys (and of the values) of one token in one layer."""
        return self.width // self.heads * self.kv_heads


_7B = Shape(width=4096, mlp=11008, layers=32, heads=32, kv_heads=32)
_13B = Shape(width=5120, mlp=13824, layers=40, heads=40, kv_heads=40)
_TINY = Shape(32, 64, 2, 4, 4, vocab=320, tower=Encoder(width=32, mlp=64, heads=4))

SHAPES = {
    "llava-v1.5-7b": _7B,
    "llava-v1.5-13b": _13B,
    "llava-v1.6-vicuna-7b": replace(_7B, anyres=True),
    "llava-v1.6-vicuna-13b": replace(_13B, anyres=True),
    "llava-v1.6-mistral-7b": Shape(4096, 14336, 32, 32, 8, anyres=True, mistral=True),
    "tiny": _TINY,  # for trying the command: real tokens, no time
    "tiny-anyres": replace(_TINY, anyres=True),
}


def shape(name: str, layers: int | None = None) -> Shape:
    """A published shape by name, its language model cut to `layers` layers."""
    if name not in SHAPES:
        raise ValueError(f"unknown shape {name!r}; choose from {', '.join(SHAPES)}")
    if layers is None:
        return SHAPES[name]
    if layers < 1:
        raise ValueError(f"layers must be at least 1, got {layers}")
    return replace(SHAPES[name], layers=layers)


def text_config(model: Any) -> Any:
    """The language model's settings: a part of transformers' config, official LLaVA's itself."""
    return getattr(model.config, "text_config", model.config)


def shape_of(model: Any) -> Shape:
    """The shape of a loaded model."""
    config, text = model.config, text_config(model)
    tower = getattr(config, "vision_config", None) or model.get_vision_tower().config
    tiled = getattr(config, "image_aspect_ratio", None) == "anyres"
    return Shape(
        width=text.hidden_size,
        mlp=text.intermediate_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        vocab=text.vocab_size,
        anyres=tiled or config.model_type == "llava_next",
        mistral="mistral" in text.model_type,
        tower=Encoder(
            width=tower.hidden_size,
            mlp=tower.intermediate_size,
            layers=tower.num_hidden_layers,
            heads=tower.num_attention_heads,
            side=tower.image_size,
            patch=tower.patch_size,
        ),
    )
