"""Shapes of the published LLaVA checkpoints, and models of these shapes with random weights.

A model of random weights takes the same time per token as a trained one; it is built where it
runs, in the asked dtype, so that nothing is downloaded or written.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from eval.untrained.random_llava import PINPOINTS

if TYPE_CHECKING:
    import torch


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


def shape_of(model: Any) -> Shape:
    """The shape of a loaded model."""
    config, tower = model.config, model.get_vision_tower().config
    return Shape(
        width=config.hidden_size,
        mlp=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        vocab=config.vocab_size,
        anyres=getattr(config, "image_aspect_ratio", None) == "anyres",
        mistral="mistral" in config.model_type,
        tower=Encoder(
            width=tower.hidden_size,
            mlp=tower.intermediate_size,
            layers=tower.num_hidden_layers,
            heads=tower.num_attention_heads,
            side=tower.image_size,
            patch=tower.patch_size,
        ),
    )


def random_model(
    shape: Shape, device: str, dtype: torch.dtype, attention: str = "sdpa"
) -> tuple[Any, Any]:
    """(model, image_processor) of a shape, with random weights."""
    import torch
    from transformers import CLIPVisionConfig

    from llava_hivtp.loading import pil_processor
    from llava_hivtp.model import PrunedLlavaLlamaForCausalLM, PrunedLlavaMistralForCausalLM

    tower = shape.tower
    default = torch.get_default_dtype()
    with tempfile.TemporaryDirectory() as folder:
        CLIPVisionConfig(
            hidden_size=tower.width,
            intermediate_size=tower.mlp,
            num_hidden_layers=tower.layers,
            num_attention_heads=tower.heads,
            image_size=tower.side,
            patch_size=tower.patch,
        ).save_pretrained(folder)
        config = _config(shape, folder)
        config._attn_implementation = attention
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                torch.manual_seed(0)
                cls = (
                    PrunedLlavaMistralForCausalLM if shape.mistral else PrunedLlavaLlamaForCausalLM
                )
                model = cls(config)
        finally:
            torch.set_default_dtype(default)
    if shape.anyres:
        torch.nn.init.normal_(model.get_model().image_newline.data)
    processor = pil_processor()(
        size={"shortest_edge": tower.side}, crop_size={"height": tower.side, "width": tower.side}
    )
    return model.eval().requires_grad_(False), processor


def _config(shape: Shape, tower: str) -> Any:
    from llava.model.language_model.llava_llama import LlavaConfig
    from llava.model.language_model.llava_mistral import LlavaMistralConfig

    side = shape.tower.side
    # The published checkpoint attends to everything; Mistral's default is a window.
    own = {"sliding_window": None} if shape.mistral else {}
    return (LlavaMistralConfig if shape.mistral else LlavaConfig)(
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab,
        max_position_embeddings=8192,
        mm_vision_tower=tower,
        mm_hidden_size=shape.tower.width,
        mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=-2,
        mm_vision_select_feature="patch",
        image_aspect_ratio="anyres" if shape.anyres else "pad",
        mm_patch_merge_type="spatial_unpad" if shape.anyres else "flat",
        image_grid_pinpoints=[[w * side, h * side] for w, h in PINPOINTS],
        unfreeze_mm_vision_tower=True,  # the tower is part of the model: no checkpoint is read
        **own,
    )
