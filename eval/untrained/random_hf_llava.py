"""A LLaVA of any shape with random weights, saved as transformers' own (llava-hf) checkpoint.

For a serving engine: it answers nonsense, in the time and with the token counts of a real one.
Needs torch and transformers alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eval.untrained.models import PINPOINTS, tower_config
from eval.untrained.random_llava import byte_tokenizer
from eval.untrained.shapes import Encoder, Shape
from llava_hivtp.hub_names import write_hub_names

CHAT = """{% for message in messages %}{{ message['role'].upper() }}: \
{% for part in message['content'] %}\
{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}\
{% endfor %} {% endfor %}ASSISTANT:"""


def random_hf_llava(folder: str | Path, shape: Shape, seed: int = 0, weights: bool = True) -> Path:
    """Write a random checkpoint of a shape that transformers and vLLM take; returns the folder.

    Without `weights` all but them, for an engine that makes up its own.
    """
    folder, tokenizer = Path(folder), byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    kind = "LlavaNext" if shape.anyres else "Llava"
    config = _config(kind, shape, tokenizer)
    config.architectures = [f"{kind}ForConditionalGeneration"]
    config.save_pretrained(folder)
    _processor(kind, tokenizer, shape.tower).save_pretrained(folder)
    if weights:
        _save_weights(folder, config, seed)
    return folder


def _save_weights(folder: Path, config: Any, seed: int) -> None:
    import torch
    import transformers as hf

    torch.manual_seed(seed)
    model = getattr(hf, config.architectures[0])(config)
    _spread(model)
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    write_hub_names(folder)


def _config(kind: str, shape: Shape, tokenizer: Any) -> Any:
    import transformers as hf

    text = hf.LlamaConfig(
        vocab_size=max(shape.vocab, len(tokenizer)),
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=8192,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    given = {"image_grid_pinpoints": _pinpoints(shape.tower)} if shape.anyres else {}
    return getattr(hf, f"{kind}Config")(
        vision_config=tower_config(shape.tower),
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        **given,
    )


def _pinpoints(tower: Encoder) -> list[list[int]]:
    return [[h * tower.side, w * tower.side] for w, h in PINPOINTS]  # (height, width) here


def _spread(model: Any) -> None:
    """Weights that tell images and tokens apart: the usual initialisation is too even for that."""
    for name, weight in model.named_parameters():
        fan_in = weight[0].numel() if weight.ndim > 1 else 1
        if "vision_tower" in name and weight.ndim > 1:
            sharp = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
            weight.data.normal_(0, sharp * fan_in**-0.5)
        elif "projector" in name and weight.ndim > 1:
            weight.data.normal_(0, 0.5 * fan_in**-0.5)
        elif "embed_tokens" in name:
            weight.data.normal_(0, 0.7)
        elif "image_newline" in name:
            weight.data.normal_(0, 0.3)
        elif weight.ndim > 1:
            weight.data.normal_(0, fan_in**-0.5)


def _processor(kind: str, tokenizer: Any, tower: Encoder) -> Any:
    import transformers as hf

    size: dict[str, Any] = {"size": {"shortest_edge": tower.side}}
    size["crop_size"] = {"height": tower.side, "width": tower.side}
    images = (
        hf.LlavaNextImageProcessor(image_grid_pinpoints=_pinpoints(tower), **size)
        if kind == "LlavaNext"
        else hf.CLIPImageProcessor(**size)
    )
    return getattr(hf, f"{kind}Processor")(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=tower.patch,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        image_token="<image>",
        chat_template=CHAT,
    )
