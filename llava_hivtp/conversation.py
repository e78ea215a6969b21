"""The words around a question, as the checkpoint was trained to read them.

A wrong template silently costs points on every benchmark.
"""

from __future__ import annotations

import re
import zlib
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import conv_templates
from llava.mm_utils import get_model_name_from_path


def template_name(checkpoint: str, config: Any, override: str | None = None) -> str:
    """LLaVA's template for a checkpoint: `override`, its config's `conv_template`, or by name.

    Raises:
        ValueError: if the override or the config names no template of LLaVA.
    """
    given = getattr(config, "conv_template", None) if override is None else override
    if given is not None:
        if not isinstance(given, str) or given not in conv_templates:
            raise ValueError(
                f"unknown conv_template {given!r}; choose from {', '.join(sorted(conv_templates))}"
            )
        return given
    name = get_model_name_from_path(str(checkpoint)).lower()
    if "llama-2" in name:
        return "llava_llama_2"
    if "mistral" in name or "mistral" in config.model_type:
        return "mistral_instruct"
    return "chatml_direct" if "34b" in name else "vicuna_v1"


def chat_name(processor: Any) -> str:
    """A processor's chat template by its content, for the protocol of a result."""
    if not processor.chat_template:
        raise ValueError("the checkpoint's processor has no chat template")
    return f"chat template {zlib.crc32(str(processor.chat_template).encode()):08x}"


def build_prompt(template: str, question: str, images: int) -> str:
    """A first turn: image marks, unless the question places them itself, then the question.

    Raises:
        ValueError: if the question places another number of images.
    """
    placed = question.count(DEFAULT_IMAGE_TOKEN)
    if not placed and images:
        question = " ".join([DEFAULT_IMAGE_TOKEN] * images) + "\n" + question
    elif placed != images:
        raise ValueError(
            f"the question has {placed} marks {DEFAULT_IMAGE_TOKEN} for {images} images: {question}"
        )
    conversation = conv_templates[template].copy()
    conversation.append_message(conversation.roles[0], question)
    conversation.append_message(conversation.roles[1], None)
    return conversation.get_prompt()


def unknown_words(tokenizer: Any, text: str) -> list[str]:
    """Words of a text that a tokenizer has no token for; one with bytes, as LLaVA's, has none."""
    words = dict.fromkeys(re.findall(r"\w+", text))
    return [word for word in words if tokenizer.unk_token_id in tokenizer(word).input_ids]
