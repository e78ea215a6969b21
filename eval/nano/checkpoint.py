"""Write what was trained as an official LLaVA checkpoint: one folder, tower and all."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from eval.nano.draw import PINPOINTS, SIDE
from eval.nano.text import build_tokenizer
from eval.nano.tower import MEAN, STD

_TOWER = "tower"  # `load` looks for a relative tower inside the checkpoint's folder


def export(
    folder: Path, parts: nn.ModuleDict, learned: nn.ModuleDict, anyres: bool = False
) -> Path:
    """Save tower, projector, language model and tokenizer in half precision."""
    tower, language = parts["tower"], learned["language"]
    _write_json(folder / "config.json", _config(language.config.to_dict(), anyres))
    # A greedy answer ends at </s>; transformers wants to find that written down.
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "do_sample": False}
    _write_json(folder / "generation_config.json", generation)
    weights = {k: v for k, v in language.state_dict().items() if k != "lm_head.weight"}  # tied
    for name, value in learned["projector"].state_dict().items():
        weights[f"model.mm_projector.{name}"] = value
    if anyres:
        weights["model.image_newline"] = learned["newline"].value
    _save(folder / "model.safetensors", weights)
    _save(folder / _TOWER / "model.safetensors", _prefixed(tower.state_dict()))
    _write_json(folder / _TOWER / "config.json", _tower_config(tower.config.to_dict()))
    _write_json(folder / _TOWER / "preprocessor_config.json", _processor())
    build_tokenizer().save_pretrained(folder)
    named = json.loads((folder / "tokenizer_config.json").read_text())
    # transformers 5 writes its own new name for this class, 4 does not know it.
    named["tokenizer_class"] = "PreTrainedTokenizerFast"
    _write_json(folder / "tokenizer_config.json", named)
    return folder


def digest(folder: Path) -> str:
    """One number for all weights of a checkpoint."""
    sums = hashlib.sha256()
    for file in sorted(folder.rglob("*.safetensors")):
        sums.update(file.read_bytes())
    return sums.hexdigest()


def _config(language: dict[str, Any], anyres: bool) -> dict[str, Any]:
    keep = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "vocab_size", "max_position_embeddings", "rms_norm_eps",
        "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "hidden_act",
    )  # fmt: skip
    config = {key: language[key] for key in keep} | {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "torch_dtype": "float16",
        "rope_theta": 10000.0,
        "use_cache": True,
        "conv_template": "vicuna_v1",
        "mm_vision_tower": _TOWER,
        "mm_hidden_size": language["hidden_size"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_patch_merge_type": "spatial_unpad" if anyres else "flat",
        "image_aspect_ratio": "anyres" if anyres else "square",
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": 2048,
    }
    if anyres:
        config["image_grid_pinpoints"] = PINPOINTS
    return config


def _tower_config(config: dict[str, Any]) -> dict[str, Any]:
    keep = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "image_size", "patch_size", "num_channels", "hidden_act", "layer_norm_eps",
    )  # fmt: skip
    kind = {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model"}
    return kind | {"torch_dtype": "float16"} | {key: config[key] for key in keep}


def _processor() -> dict[str, Any]:
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": SIDE},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": SIDE, "width": SIDE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [MEAN] * 3,
        "image_std": [STD] * 3,
        "do_convert_rgb": True,
    }


def _prefixed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as CLIP checkpoints have them, which both versions of transformers read."""
    plain = {k.removeprefix("vision_model."): v for k, v in weights.items()}
    return {f"vision_model.{k}": v for k, v in plain.items() if v.is_floating_point()}


def _save(path: Path, weights: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    half = {k: v.detach().to(torch.float16).contiguous() for k, v in weights.items()}
    save_file(half, path, metadata={"format": "pt"})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")
