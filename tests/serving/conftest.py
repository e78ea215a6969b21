"""An engine of vLLM in this process, tiny checkpoints, pictures. Skipped where vLLM is missing."""

from __future__ import annotations

import importlib.util
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

HERE = Path(__file__).parent
INSTALLED = importlib.util.find_spec("vllm") is not None
SIDE = 56  # pixels of a tile: 4 x 4 patches
SIZES = [(67, 50), (56, 56), (33, 83), (107, 80), (150, 50), (57, 55)]

if INSTALLED:
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the machine may be busy with other things
    }
    os.environ["PYTHONPATH"] = str(HERE.parents[1])  # in processes to come


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without vLLM nothing here can run."""
    if INSTALLED:
        return
    skip = pytest.mark.skip(reason="needs vLLM: make test-vllm")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Folder of a tiny random checkpoint: "v15" or "next"."""
    made = {}

    def get(kind):
        from eval.untrained.random_hf_llava import random_hf_llava
        from eval.untrained.shapes import Encoder, Shape

        if kind not in made:
            folder = tmp_path_factory.mktemp("hf") / f"llava-{kind}"
            tower = Encoder(width=64, mlp=256, layers=6, heads=4, side=SIDE)
            shape = Shape(128, 352, 2, 4, 4, 1, anyres=kind == "next", tower=tower)
            made[kind] = random_hf_llava(folder, shape)
        return str(made[kind])

    return get


@pytest.fixture(scope="session")
def pictures():
    """Blocks of colour and some noise, in every shape of tile grid."""

    def make(seed, size):
        rng = np.random.default_rng(seed)
        coarse = Image.fromarray(rng.integers(0, 255, (7, 9, 3), np.uint8)).resize(size, 0)
        values = np.asarray(coarse, np.int16) + rng.integers(-20, 20, (*size[::-1], 3))
        return Image.fromarray(values.clip(0, 255).astype(np.uint8))

    return [make(seed, size) for seed, size in enumerate(SIZES)]


@contextmanager
def engine(model, hivtp=None, **arguments):
    """An engine in this process; closed at the end, so that the next one can start."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    given = {
        "dtype": "float32",
        "max_model_len": 2048,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 1 << 26,
        "max_num_seqs": 16,
        "block_size": 32,
        "limit_mm_per_prompt": {"image": 2},
        "hf_overrides": {} if hivtp is None else {"hivtp": hivtp},
    }
    llm = LLM(model, **given | arguments)
    try:
        yield llm
    finally:
        del llm
        cleanup_dist_env_and_memory()


@pytest.fixture(scope="session")
def command():
    """Environment in which the command `vllm` runs."""
    return dict(os.environ, VLLM_ENABLE_V1_MULTIPROCESSING="1")
