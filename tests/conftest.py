"""Drawn data sets and tiny checkpoints, made once per test process."""

from __future__ import annotations

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TQDM_DISABLE": "1"}
os.environ.setdefault("LOGURU_LEVEL", "WARNING")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported: run kernels on CPUs


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """A data folder with all drawn data sets, about 40 questions each."""
    from eval.nano.datasets import write

    return write(tmp_path_factory.mktemp("data"), "quick", further=True)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of a tiny random checkpoint: 4 encoder layers, 4 x 4 patches per tile."""
    made = {}

    def get(anyres=False, mistral=False):
        from eval.untrained.random_llava import random_llava

        if (anyres, mistral) not in made:
            name = f"llava-{'v1.6' if anyres else 'v1.5'}-{'mistral' if mistral else 'vicuna'}"
            folder = tmp_path_factory.mktemp("checkpoints") / name
            made[anyres, mistral] = random_llava(
                folder, anyres=anyres, mistral=mistral, encoder_layers=4, image_size=56
            )
        return made[anyres, mistral]

    return get


@pytest.fixture
def table(tmp_path, tiny):
    """Writes a two-row table for the tiny checkpoint; returns its path."""

    def write(tasks="mme, pope", rows=("full", "hivtp")):
        measures = "mme: perception, pope: accuracy, gqa: testdev balanced, ocr: points of 1000"
        known = {"mme", "pope", "gqa", "ocrbench"}
        chosen = [task.strip() for task in tasks.split(",")]
        assert set(chosen) <= known
        columns = [("ocr" if task == "ocrbench" else task) for task in chosen]
        protocol = ", ".join(p for p in measures.split(", ") if p.split(":")[0] in columns)
        lines = {
            "full": "  - {id: full, pruner: none, block: 100}",
            "hivtp": "  - {id: hivtp, pruner: hivtp, r: 2, k: 25, c: 2, layers: [2, 3], block: 50}",
            "deep": "  - {id: deep, pruner: hivtp, r: 2, k: 25, c: 2, layers: [9], block: 50}",
            "inside": "  - {id: inside, pruner: fastv, after: 1, keep: 0.25, block: 63}",
            "both": "  - {id: both, pruner: pdrop, after: [1], keep: [0.5],"
            " encoder: 'hivtp:r=2:k=25:c=2:layers=2+3', block: 40}",
            "failing": "  - {id: failing, pruner: 'external_pruner:Failing', keep: 0.5, block: 50}",
        }
        path = tmp_path / "table.yaml"
        path.write_text(
            f"title: tiny\nmodels: ['{tiny()}']\nlayout: unpad\npatches: 16\n"
            f"tasks: [{tasks}]\nprotocol: {{{protocol}}}\nrows:\n"
            + "\n".join(lines[row] for row in rows)
        )
        return path

    return write
