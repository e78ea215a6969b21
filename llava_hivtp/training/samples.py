"""LLaVA's data set; a bad sample is an error before the first step."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llava import conversation
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.train.train import make_supervised_data_module
from PIL import Image

SPEAKERS = ("human", "gpt")


def checked_data(tokenizer: Any, data_args: Any) -> dict[str, Any]:
    """LLaVA's data set and collator, after all samples were checked and all images decoded.

    Under torchrun every process decodes its share of the images.

    Raises:
        FileNotFoundError: if the file, or a sample's image, is not there.
        ValueError: if the file is no list of samples, or a sample is none, naming it.
    """
    path = data_args.data_path
    if not path or not os.path.isfile(path):
        raise FileNotFoundError(f"--data_path {path} is no file")
    try:
        made = make_supervised_data_module(tokenizer, data_args)
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    samples = made["train_dataset"].list_data_dict
    check_samples(samples, path, data_args.image_folder)
    if conversation.default_conversation.sep_style is conversation.SeparatorStyle.PLAIN:
        for i, each in enumerate(samples):
            if "image" not in each or len(each["conversations"]) != 2:
                raise ValueError(
                    f"{_named(samples, i, path)}: --version plain takes an image and one turn each"
                )
    if not hasattr(tokenizer, "legacy"):  # which LLaVA reads from the second question on
        for i in (i for i, each in enumerate(samples) if len(each["conversations"]) > 2):
            raise ValueError(
                f"{_named(samples, i, path)} has {len(samples[i]['conversations'])} turns, and "
                f"{type(tokenizer).__name__} is not Llama's slow tokenizer: LLaVA's trainer takes "
                "one question and one answer with others"
            )
    return made


def check_samples(samples: Any, data_path: str, image_folder: str | None) -> None:
    """Raise an error that names the first bad sample, counted from 0, and its id."""
    if not isinstance(samples, list) or not samples:
        raise ValueError(f"{data_path} must hold a list of samples, and not an empty one")
    for i, sample in enumerate(samples):
        if wrong := _wrong_with(sample):
            raise ValueError(f"{_named(samples, i, data_path)} {wrong}")
    pictured = [i for i, sample in enumerate(samples) if "image" in sample]
    if pictured and (image_folder is None or not os.path.isdir(image_folder)):
        raise FileNotFoundError(
            f"{_named(samples, pictured[0], data_path)} has an image, and --image_folder "
            f"{image_folder} is no folder"
        )
    rank, world = int(os.getenv("RANK", "0")), int(os.getenv("WORLD_SIZE", "1"))
    mine = pictured[rank::world]
    with ThreadPoolExecutor() as pool:
        paths = [Path(image_folder, samples[i]["image"]) for i in mine]
        for i, wrong in zip(mine, pool.map(_wrong_with_image, paths), strict=True):
            if wrong:
                pool.shutdown(wait=False, cancel_futures=True)
                raise type(wrong)(f"{_named(samples, i, data_path)}: {wrong}")


def _named(samples: Sequence[Any], i: int, data_path: str) -> str:
    sample = samples[i]
    name = f" (id {sample['id']!r})" if isinstance(sample, dict) and "id" in sample else ""
    return f"{data_path}: sample {i}{name}"


def _wrong_with(sample: Any) -> str:
    """What is wrong with a sample, its image not opened; nothing: an empty string."""
    if not isinstance(sample, dict):
        return f"must be a mapping, got {type(sample).__name__}"
    turns = sample.get("conversations")
    if not isinstance(turns, list) or not turns:
        return "needs 'conversations', a list that is not empty"
    for j, turn in enumerate(turns):
        speaker, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (0, 0)
        if speaker != SPEAKERS[j % 2]:
            return f"turn {j}: 'from' must be {SPEAKERS[j % 2]!r}, got {speaker!r}"
        if not isinstance(text, str):
            return f"turn {j}: 'value' must be text, got {text!r}"
    if len(turns) < 2:
        return "has a question and no answer"
    # LLaVA moves all marks of a turn into one in front of it.
    marks = sum(DEFAULT_IMAGE_TOKEN in turn["value"] for turn in turns)
    if "image" not in sample:
        return f"has {marks} turns with {DEFAULT_IMAGE_TOKEN} and no 'image'" if marks else ""
    if not isinstance(sample["image"], str):
        return f"'image' must name one file, got {sample['image']!r}"
    if marks != 1:
        return f"has an 'image', and {marks} turns with {DEFAULT_IMAGE_TOKEN}; one is needed"
    return ""


def _wrong_with_image(path: Path) -> Exception | None:
    """An error if the image is missing or cannot be decoded to its end."""
    try:
        with Image.open(path) as image:
            image.draft("RGB", (1, 1))  # a JPEG is read whole, but unpacked small
            image.load()
    except FileNotFoundError:
        return FileNotFoundError(f"{path} is not there")
    except Exception as error:  # PIL's readers raise what they like
        return ValueError(f"{path} cannot be decoded: {error}")
    return None
