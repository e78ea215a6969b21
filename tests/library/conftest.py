"""Small random LLaVAs, written once per test process and loaded like real checkpoints."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from eval.untrained.random_llava import random_llava
from llava_hivtp import load

torch.set_num_threads(1)

# transformers 4 has neither these classes, nor positions that go on from the last, nor decoders
# that methods inside the language model know.
# LLaVA's trainer cannot be imported beside transformers 5.
VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
BEFORE_5 = VERSION < (5,)
NEEDS_5 = [
    "test_dropping.py",
    "test_hf.py",
    "test_inside.py",
    "test_positions.py",
    "test_qwen_vl.py",
    "test_siglip.py",
    "test_weighing.py",
]
collect_ignore = NEEDS_5 if BEFORE_5 else ["test_trainer.py"]
if (4, 57) <= VERSION < (5,):  # these two classes take image tokens as embeddings there
    collect_ignore = [name for name in NEEDS_5 if name != "test_hf.py"]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Folder of a checkpoint by kind, made on first use."""
    made = {}

    def get(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            made[kind] = random_llava(
                folder, anyres=kind != "v15", mistral=kind == "mistral", seed=len(kind)
            )
        return made[kind]

    return get


@pytest.fixture(scope="session")
def loaded(checkpoints):
    """(model, tokenizer, image_processor) by kind; tests leave the pruner as they like."""
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = load(checkpoints(kind), device_map="cpu")[:3]
        return made[kind]

    return get


@pytest.fixture(scope="module")
def pair(tiny, tmp_path_factory):
    """(official, converted) of the same random weights, each as `load` gives it, by kind."""
    from llava_hivtp.convert import to_transformers  # transformers 4 lacks what it imports

    made = {}

    def get(kind):
        if kind not in made:
            official = tiny(anyres=kind == "next")
            folder = to_transformers(official, tmp_path_factory.mktemp(kind), torch.float32)
            made[kind] = load(official, device_map="cpu"), load(folder, device_map="cpu")
        return made[kind]

    return get


@pytest.fixture(scope="session")
def photo():
    """A textured picture of a given (width, height), the same every time."""

    def make(size, seed=0):
        rng = np.random.default_rng(seed)
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        fine = rng.normal(0, 12, (size[1], size[0], 3))
        values = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)) + fine
        return Image.fromarray(values.clip(0, 255).astype(np.uint8))

    return make
