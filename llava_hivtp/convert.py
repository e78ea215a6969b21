"""An official checkpoint, written again for transformers' own LLaVA or LLaVA-NeXT, and vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
)

from llava_hivtp.conversation import build_prompt, template_name
from llava_hivtp.hub_names import write_hub_names
from llava_hivtp.loading import TRAINED_WITH, load

IMAGE = "<image>"  # the placeholder, a token that official checkpoints do not have
_RENAMED = {
    "model.vision_tower.vision_tower.": "model.vision_tower.",
    "model.mm_projector.0.": "model.multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "model.multi_modal_projector.linear_2.",
    "model.image_newline": "model.image_newline",
    "model.": "model.language_model.",
}


def to_transformers(
    checkpoint: str | Path, folder: str | Path, dtype: torch.dtype | str = torch.float16
) -> Path:
    """Write an official LLaVA checkpoint, and its processor, for transformers' own classes.

    Returns the folder.

    Weights are the same. The vocabulary has one more token, the placeholder `<image>`, which is
    never generated. The chat template asks one question, in the checkpoint's own conversation.

    Args:
        checkpoint: a folder or hub id as `load` takes it, LLaVA-v1.5 or LLaVA-NeXT with a
            projector of two layers (`mlp2x_gelu`).
        folder: where to.
        dtype: of the weights that are written.

    Raises:
        ValueError: if transformers' classes cannot be this model.
    """
    model, tokenizer, image_processor, _ = load(checkpoint, dtype=dtype, device_map="cpu")
    official = model.config
    _check(official, checkpoint)
    anyres = official.image_aspect_ratio == "anyres"
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    token = tokenizer.convert_tokens_to_ids(IMAGE)
    model.resize_token_embeddings(max(len(tokenizer), official.vocab_size), mean_resizing=False)
    config = _config(model, token, anyres)
    cls = LlavaNextForConditionalGeneration if anyres else LlavaForConditionalGeneration
    converted = cls(config).eval().to(model.dtype)
    converted.load_state_dict(_renamed(model.state_dict()), strict=True)
    converted.generation_config = model.generation_config
    converted.generation_config.suppress_tokens = [token]
    processor = (LlavaNextProcessor if anyres else LlavaProcessor)(
        image_processor=_image_processor(official, image_processor),
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=_chat_template(template_name(str(checkpoint), official)),
    )
    converted.save_pretrained(folder)
    write_hub_names(folder)
    processor.save_pretrained(folder)
    return Path(folder)


def _check(config: Any, checkpoint: str | Path) -> None:
    """Raise a ValueError unless transformers' classes can be this model."""
    projector = getattr(config, "mm_projector_type", "linear")
    merge = getattr(config, "mm_patch_merge_type", "flat")
    anyres = config.image_aspect_ratio == "anyres"
    if projector != "mlp2x_gelu":
        raise ValueError(f"{checkpoint}: mm_projector_type={projector!r}, only mlp2x_gelu converts")
    if merge != ("spatial_unpad" if anyres else "flat"):
        raise ValueError(
            f"{checkpoint}: mm_patch_merge_type={merge!r} with image_aspect_ratio="
            f"{config.image_aspect_ratio!r} is none that transformers knows"
        )


def _config(model: Any, image_token: int, anyres: bool) -> Any:
    official, tower = model.config, model.get_vision_tower()
    text = official.model_type.removeprefix("llava_")
    own = CONFIG_MAPPING[text]().to_dict()  # without LLaVA's settings
    options = {
        "vision_config": _alone(tower.vision_tower.config.to_dict()),
        "text_config": _alone({name: getattr(official, name, own[name]) for name in own})
        | {"model_type": text},
        "image_token_index": image_token,
        "vision_feature_layer": tower.select_layer,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": official.tie_word_embeddings,
    }
    if hasattr(official, TRAINED_WITH):
        options[TRAINED_WITH] = getattr(official, TRAINED_WITH)
    if not anyres:
        return LlavaConfig(**options)
    return LlavaNextConfig(**options, image_grid_pinpoints=_pinpoints(official))


def _alone(config: dict[str, Any]) -> dict[str, Any]:
    """Without what says where it was read."""
    drop = ("_name_or_path", "architectures", "transformers_version")
    return {name: value for name, value in config.items() if name not in drop}


def _pinpoints(config: Any) -> list[list[int]]:
    """(height, width) where official ones are (width, height), in the same order: ties stay."""
    return [[height, width] for width, height in config.image_grid_pinpoints]


def _renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, weight in state.items():
        old = next((old for old in _RENAMED if name.startswith(old)), "")
        renamed[_RENAMED.get(old, "") + name.removeprefix(old)] = weight
    return renamed


def _image_processor(config: Any, clip: Any) -> Any:
    """Transformers' processor that gives the pixels of LLaVA's preprocessing."""
    try:
        from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
        from transformers.models.llava_next.image_processing_pil_llava_next import (
            LlavaNextImageProcessorPil,
        )
    except ImportError:  # transformers 4 has PIL ones only
        from transformers import LlavaImageProcessor as LlavaImageProcessorPil
        from transformers import LlavaNextImageProcessor as LlavaNextImageProcessorPil

    common = {
        name: getattr(clip, name)
        for name in ("size", "crop_size", "image_mean", "image_std", "resample", "rescale_factor")
    }
    if config.image_aspect_ratio == "anyres":
        return LlavaNextImageProcessorPil(**common, image_grid_pinpoints=_pinpoints(config))
    if config.image_aspect_ratio == "pad":
        return LlavaImageProcessorPil(**common, do_pad=True)
    return clip


def _chat_template(conversation: str) -> str:
    """One question, image marks in front, as the conversation's `build_prompt` puts it."""
    before, after = build_prompt(conversation, "QUESTION", 0).split("QUESTION")
    quoted = [json.dumps(text, ensure_ascii=False) for text in (before, after)]
    return (
        "{% for message in messages %}{{ " + quoted[0] + " }}"
        "{% set parts = message['content'] if message['content'] is not string else [] %}"
        "{% set images = parts | selectattr('type', 'equalto', 'image') | list %}"
        "{% for part in images %}{{ '<image>' }}{{ ' ' if not loop.last else '\\n' }}{% endfor %}"
        "{% for part in parts %}{{ part['text'] if part['type'] == 'text' else '' }}{% endfor %}"
        "{{ message['content'] if message['content'] is string else '' }}"
        "{{ " + quoted[1] + " }}{% endfor %}"
    )
