"""Weights under the names that the hub's llava-hf checkpoints have: vLLM 0.32 reads no others."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

_SAVED, _HUB = "vision_tower.", "vision_tower.vision_model."  # by transformers 5; on the hub


def write_hub_names(folder: str | Path) -> None:
    """Rename the vision tower's weights in a checkpoint that transformers has just saved.

    transformers reads them under either name.
    """
    folder = Path(folder)
    for file in folder.glob("*.safetensors"):
        renamed = {_on_hub(name): weight for name, weight in load_file(file).items()}
        save_file(renamed, file, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        content = json.loads(index.read_bytes())
        places = content["weight_map"]
        content["weight_map"] = {_on_hub(name): place for name, place in places.items()}
        index.write_text(json.dumps(content, indent=2))


def _on_hub(name: str) -> str:
    return name if _HUB in name else name.replace(_SAVED, _HUB)
