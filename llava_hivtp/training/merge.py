"""`python -m llava_hivtp.training.merge BASE TUNED OUT`: the tuned model as a whole checkpoint."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PretrainedConfig

from llava_hivtp.families import detach
from llava_hivtp.loading import TRAINED_WITH, load

PROJECTOR = "mm_projector.bin"  # LLaVA's own names
REST = "non_lora_trainables.bin"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m llava_hivtp.training.merge")
    parser.add_argument("base", help="the checkpoint that was tuned")
    parser.add_argument("tuned", help="--output_dir of the training, or a checkpoint in it")
    parser.add_argument("out", help="folder to write to")
    own = parser.parse_args(arguments)
    try:
        print(merge(own.base, own.tuned, own.out))
    except (FileNotFoundError, ImportError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def merge(base: str | Path, tuned: str | Path, out: str | Path) -> Path:
    """Write an official checkpoint: the base's weights, the tuned projector, LoRA added in.

    In the dtype of the base; a vision tower inside the base's folder is copied. Returns the folder.

    Raises:
        FileNotFoundError: if nothing that was trained lies in `tuned`.
        ImportError: for LoRA without PEFT.
        ValueError: if the weights do not fit the base.
    """
    tuned, out = Path(tuned), Path(out)
    lora = (tuned / REST).is_file()
    if not lora and not (tuned / PROJECTOR).is_file():
        raise FileNotFoundError(f"{tuned} holds neither {PROJECTOR} nor {REST}: nothing to merge")
    settings, _ = PretrainedConfig.get_config_dict(base)
    model, tokenizer, *_ = load(base, dtype="float32", device_map="cpu")
    found = torch.load(tuned / (REST if lora else PROJECTOR), map_location="cpu")
    # PEFT has wrapped the model: base_model.model.X is X.
    found = {name.removeprefix("base_model.model."): weight for name, weight in found.items()}
    if unknown := model.load_state_dict(found, strict=False).unexpected_keys:
        raise ValueError(f"{tuned} holds weights that {base} lacks: {unknown}")
    if lora:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(tuned)).merge_and_unload()
    learned = json.loads((tuned / "config.json").read_text())
    for name in (TRAINED_WITH, "image_aspect_ratio"):
        setattr(model.config, name, learned[name])
    tower = settings["mm_vision_tower"]
    if (inside := Path(base) / tower).is_dir():
        shutil.copytree(inside, out / tower, dirs_exist_ok=True)
        model.config.mm_vision_tower = tower
    dtype = settings.get("torch_dtype") or settings.get("dtype") or "float32"
    weights = detach(model).to(getattr(torch, dtype)).state_dict()
    # A tower that was tuned with the model lies in its checkpoint, any other one elsewhere.
    if not getattr(model.config, "unfreeze_mm_vision_tower", False):
        weights = {name: w for name, w in weights.items() if ".vision_tower." not in name}
    model.save_pretrained(out, state_dict=weights)
    tokenizer.save_pretrained(out)
    return out


if __name__ == "__main__":
    sys.exit(main())
