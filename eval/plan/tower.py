"""What a checkpoint's config says of its parts: read without a model, before any weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.digests import checkpoint_folder
from eval.plan.table import Table


@dataclass(frozen=True)
class Tower:
    """A vision tower, and the language model behind it, as far as a table's rows hang on them."""

    layers: int
    patches: int  # per tile
    language_layers: int | None  # None: the config leaves it to transformers' default


def read_tower(model: str) -> Tower:
    """The tower of a checkpoint.

    Raises:
        FileNotFoundError: if the checkpoint or its tower is not here.
        ValueError: if a config does not say what is needed; the message names the file.
    """
    folder = checkpoint_folder(model)
    file = folder / "config.json"
    config = _config(file)
    language = config.get("text_config", config).get("num_hidden_layers")
    if "vision_config" not in config:  # not of transformers' format, which has the tower within
        name = config.get("mm_vision_tower")
        if not isinstance(name, str):
            raise ValueError(f"{file} names no mm_vision_tower: it is no LLaVA")
        tower = folder / name if (folder / name).is_dir() else checkpoint_folder(name)
        file = tower / "config.json"
        config = _config(file)
    config = config.get("vision_config", config)
    if "depth" in config and "image_size" not in config:
        raise ValueError(
            f"{file}: every image has a grid of its own there, and a table's blocks are shares of "
            "one number of patches: ask lmms-eval itself (--model llava_hivtp)"
        )
    try:
        side = config["image_size"] // config["patch_size"]
        return Tower(int(config["num_hidden_layers"]), side * side, language)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{file} does not describe a vision tower: {error!r}") from error


def check_tiles(model: str, verb: str) -> None:
    """Refuse checkpoints whose images are not cut into tiles that a CLIP tower reads.

    Raises:
        ValueError: if it is one of them.
        FileNotFoundError: if the checkpoint is not here.
    """
    config = _config(checkpoint_folder(model) / "config.json")
    if "vision_config" not in config:  # official LLaVA; `load` says what is none
        return
    kind = config.get("model_type")
    tower = config["vision_config"].get("model_type", "clip_vision_model")
    if kind not in ("llava", "llava_next") or tower != "clip_vision_model":
        raise ValueError(
            f"{verb} takes official LLaVA checkpoints and transformers' LLaVA and LLaVA-NeXT on "
            f"CLIP towers; {model} is a {kind} on a {tower}"
        )


def trained_with(model: str) -> dict[str, Any] | None:
    """What a checkpoint's config says it was tuned under; None for a training-free one.

    Raises:
        FileNotFoundError, ImportError: if the checkpoint is not here.
    """
    return _config(checkpoint_folder(model) / "config.json").get("trained_with")


def misfit(table: Table, tower: Tower) -> str | None:
    """Why a table is not about a model with this tower, if it is not."""
    if tower.patches == table.patches:
        return None
    return (
        f"{table.path}: patches is {table.patches}, but a tile of {table.model} has "
        f"{tower.patches}: budgets would be wrong"
    )


def misfit_here(table: Table) -> str | None:
    """The same for a checkpoint that may not be here: then nothing is known."""
    try:
        return misfit(table, read_tower(table.model))
    except (OSError, ValueError, ImportError):
        return None


def _config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file.parent} holds no {file.name}") from error
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}; fetch the checkpoint again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} is no config: it holds {type(config).__name__}")
    return config
