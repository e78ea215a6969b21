"""A LLaVA of any shape with random weights, saved as transformers' own (llava-hf) checkpoint.

For a serving engine: it answers nonsense, in the time and with the token counts of a real one.
Needs torch and transformers alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eval.untrained.random_llava import PINPOINTS, byte_tokenizer

CHAT = """{% for message in messages %}{{ message['role'].upper() }}: \
{% for part in message['content'] %}\
{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}\
{% endfor %} {% endfor %}ASSISTANT:"""


def random_hf_llava(
    folder: str | Path,
    *,
    anyres: bool = False,
    image_size: int = 336,
    patch_size: int = 14,
    width: int = 128,
    layers: int = 2,
    heads: int = 4,
    tower_width: int = 64,
    tower_layers: int = 6,
    tower_heads: int = 4,
    seed: int = 0,
) -> Path:
    """Write a random checkpoint that transformers and vLLM take; returns the folder.

    Args:
        folder: where to.
        anyres: LLaVA-NeXT instead of LLaVA-1.5.
        image_size: side of a tile in pixels.
        patch_size: side of a patch in pixels.
        width: hidden size of the language model.
        layers: its depth.
        heads: its heads.
        tower_width: hidden size of the CLIP tower.
        tower_layers: its depth.
        tower_heads: its heads.
        seed: of the weights.
    """
    import torch
    import transformers as hf

    folder, tokenizer = Path(folder), byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    pinpoints = [[h * image_size, w * image_size] for w, h in PINPOINTS]  # (height, width) here
    vision = hf.CLIPVisionConfig(
        hidden_size=tower_width,
        intermediate_size=4 * tower_width,
        num_hidden_layers=tower_layers,
        num_attention_heads=tower_heads,
        image_size=image_size,
        patch_size=patch_size,
    )
    text = hf.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 11 // 4 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=8192,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    given = {
        "vision_config": vision,
        "text_config": text,
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
    }
    config = (
        hf.LlavaNextConfig(image_grid_pinpoints=pinpoints, **given)
        if anyres
        else hf.LlavaConfig(**given)
    )
    torch.manual_seed(seed)
    kind = "LlavaNext" if anyres else "Llava"
    model = getattr(hf, f"{kind}ForConditionalGeneration")(config)
    _spread(model)
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    _hub_names(folder / "model.safetensors")
    _processor(kind, tokenizer, image_size, patch_size, pinpoints).save_pretrained(folder)
    return folder


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


def _hub_names(file: Path) -> None:
    """Name the tower's weights as the llava-hf checkpoints do; vLLM 0.32 knows no other names."""
    from safetensors.torch import load_file, save_file

    short, long = "vision_tower.", "vision_tower.vision_model."
    state = {
        name if long in name else name.replace(short, long): weight
        for name, weight in load_file(file).items()
    }
    save_file(state, file, metadata={"format": "pt"})


def _processor(
    kind: str, tokenizer: Any, image_size: int, patch_size: int, pinpoints: list[list[int]]
) -> Any:
    import transformers as hf

    size = {"size": {"shortest_edge": image_size}}
    size["crop_size"] = {"height": image_size, "width": image_size}
    images = (
        hf.LlavaNextImageProcessor(image_grid_pinpoints=pinpoints, **size)
        if kind == "LlavaNext"
        else hf.CLIPImageProcessor(**size)
    )
    return getattr(hf, f"{kind}Processor")(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=patch_size,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        image_token="<image>",
        chat_template=CHAT,
    )
