"""A LLaVA of any shape with random weights, saved as an official checkpoint.

It answers nonsense, in the time and with the token counts of a real one: for tests, for trying
the tools before weights are at hand, and for timing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eval.untrained.models import (
    image_processor,
    llava_class,
    llava_config,
    random_tower,
    tower_config,
)
from eval.untrained.shapes import Encoder, Shape


def random_llava(
    folder: str | Path,
    *,
    anyres: bool = False,
    mistral: bool = False,
    encoder_layers: int = 24,
    image_size: int = 336,
    patch_size: int = 14,
    width: int = 32,
    seed: int = 0,
) -> Path:
    """Write a small random checkpoint that `llava_hivtp.load` takes; returns the folder.

    Args:
        folder: where to; the vision tower goes into its sub-folder `tower`.
        anyres: like LLaVA-NeXT (tiles, unpadding, newlines, a tower tuned with the model)
            instead of like LLaVA-v1.5.
        mistral: a Mistral language model instead of Llama.
        encoder_layers: depth of the CLIP tower.
        image_size: side of a tile in pixels.
        patch_size: side of a patch in pixels.
        width: hidden size of tower and language model.
        seed: of the weights.
    """
    import torch

    folder, tokenizer = Path(folder), byte_tokenizer()
    encoder = Encoder(width, 2 * width, encoder_layers, heads=4, side=image_size, patch=patch_size)
    shape = Shape(width, 2 * width, 2, 4, 4, len(tokenizer), anyres, mistral, encoder)
    torch.manual_seed(seed)
    tower = random_tower(encoder)
    for parameter in tower.parameters():  # CLIP's own initialisation is too even to select by
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    tower_config(encoder).save_pretrained(folder / "tower")
    image_processor(image_size).save_pretrained(folder / "tower")
    _save(folder / "tower", _hub_names(tower.state_dict()))
    tokenizer.save_pretrained(folder)
    config = _config(shape, folder, tokenizer)
    state = llava_class(shape)(config).state_dict()
    if anyres:
        torch.nn.init.normal_(state["model.image_newline"])
        prefix = "model.vision_tower.vision_tower."
        state |= {prefix + name: w for name, w in _hub_names(tower.state_dict()).items()}
    _save(folder, state)
    config.architectures = [f"Llava{'Mistral' if mistral else 'Llama'}ForCausalLM"]
    config.mm_vision_tower = "tower"  # relative: the checkpoint may be moved
    config.unfreeze_mm_vision_tower = anyres
    config.save_pretrained(folder)
    return folder


def _config(shape: Shape, folder: Path, tokenizer: Any) -> Any:
    return llava_config(
        shape,
        tower=str(folder / "tower"),
        initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        mm_use_im_patch_token=False,
        mm_use_im_start_end=False,
        tokenizer_padding_side="right",
    )


def byte_tokenizer() -> Any:
    """A tokenizer of single bytes with LLaVA's special tokens: any text, no data."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    special["model_input_names"] = ["input_ids", "attention_mask"]  # as Llama's
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def _hub_names(state: dict[str, Any]) -> dict[str, Any]:
    """Tower weights by the names every hub checkpoint has; transformers 5 drops the prefix."""
    prefix = "vision_model."
    return {name if name.startswith(prefix) else prefix + name: w for name, w in state.items()}


def _save(folder: Path, state: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    state = {name: w.contiguous() for name, w in state.items() if not name.endswith("position_ids")}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
