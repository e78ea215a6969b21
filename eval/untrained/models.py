"""Models of a shape with random weights, in memory.

They take the same time per token as trained ones; each is built where it runs, in the asked dtype,
so that nothing is downloaded or written.
"""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING, Any

from eval.untrained.shapes import Encoder, Shape

if TYPE_CHECKING:
    import torch
    from torch import nn

PINPOINTS = [[1, 2], [2, 1], [2, 2], [3, 1], [1, 3]]  # tiles (columns, rows) of LLaVA-NeXT


def random_model(
    shape: Shape, device: str, dtype: torch.dtype, attention: str = "sdpa"
) -> tuple[Any, Any]:
    """(model, image_processor) of a shape."""
    import torch

    default = torch.get_default_dtype()
    with tempfile.TemporaryDirectory() as folder:
        tower_config(shape.tower).save_pretrained(folder)
        # The tower is part of the model, so that no checkpoint is read.
        config = llava_config(shape, folder, unfreeze_mm_vision_tower=True)
        config._attn_implementation = attention
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                torch.manual_seed(0)
                model = llava_class(shape)(config)
        finally:
            torch.set_default_dtype(default)
    if shape.anyres:
        torch.nn.init.normal_(model.get_model().image_newline.data)
    processor = image_processor(shape.tower.side)
    model.get_vision_tower().image_processor = processor
    return model.eval().requires_grad_(False), processor


def random_tower(encoder: Encoder, attention: str = "") -> nn.Module:
    """A CLIP vision tower of a shape; `attention` such as eager, by default transformers' own."""
    from transformers import CLIPVisionModel

    config = tower_config(encoder)
    if attention:
        config._attn_implementation = attention
    return CLIPVisionModel(config).eval()


def random_projector(shape: Shape) -> nn.Module:
    """LLaVA's two-layer projector of a shape."""
    from torch import nn

    wide = nn.Linear(shape.tower.width, shape.width)
    return nn.Sequential(wide, nn.GELU(), nn.Linear(shape.width, shape.width))


def tower_config(encoder: Encoder) -> Any:
    """The configuration of a CLIP vision tower."""
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=encoder.width,
        intermediate_size=encoder.mlp,
        num_hidden_layers=encoder.layers,
        num_attention_heads=encoder.heads,
        image_size=encoder.side,
        patch_size=encoder.patch,
    )


def llava_config(shape: Shape, tower: str, **own: Any) -> Any:
    """The configuration of a LLaVA whose tower lies in the folder `tower`; `own` goes on top."""
    from llava.model.language_model.llava_llama import LlavaConfig
    from llava.model.language_model.llava_mistral import LlavaMistralConfig

    side = shape.tower.side
    # The published checkpoint attends to everything; Mistral's default is a window.
    mistral = {"sliding_window": None} if shape.mistral else {}
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
        **mistral,
        **own,
    )


def llava_class(shape: Shape) -> type:
    """The class of a LLaVA of this shape, ready for a pruner."""
    from llava_hivtp.model import PrunedLlavaLlamaForCausalLM, PrunedLlavaMistralForCausalLM

    return PrunedLlavaMistralForCausalLM if shape.mistral else PrunedLlavaLlamaForCausalLM


def image_processor(side: int) -> Any:
    """CLIP's image processor for tiles of `side` pixels."""
    from llava_hivtp.loading import pil_processor

    return pil_processor()(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
