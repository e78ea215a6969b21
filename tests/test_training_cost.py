"""What a step of training takes: counted, and its ideal checked against PyTorch's own counter."""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from eval.efficiency import training
from eval.untrained.models import random_model
from eval.untrained.shapes import Encoder, shape
from llava_hivtp.pruners import read_pruner

SMALL = replace(shape("tiny"), tower=Encoder(width=32, mlp=64, layers=24, heads=4, side=168))
METHODS = ("none", "hivtp:r=2,k=25,c=2,fill=true")


@pytest.mark.parametrize("trained", ["projector", "all"])
def test_the_ideal_counts_what_runs(trained):
    model, _ = random_model(SMALL, "cpu", torch.float32, "eager")
    body = model.get_model()
    (body.mm_projector if trained == "projector" else model).requires_grad_(True)
    body.get_vision_tower().requires_grad_(False)
    body.get_vision_tower().vision_tower.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        training._step(model, read_pruner("none"), training._batch(model))
    assert training._flops(trained, SMALL, 144) == pytest.approx(
        counter.get_total_flops(), rel=0.02
    )


def test_a_step_is_timed_and_its_memory_counted(tmp_path):
    asked = training.Step(SMALL, rounds=2, device="cpu")
    said = training.measure(asked, METHODS, tmp_path / "training")
    assert (tmp_path / "training.md").read_text() == said
    first, second = csv.DictReader((tmp_path / "training.csv").open())
    assert [first["kept"], second["kept"]] == ["144", "72"]
    assert float(first["ratio"]) == float(first["ideal_ratio"]) == 1
    assert 0 < float(second["ideal_ratio"]) < 1
    assert int(second["peak_bytes"]) < int(first["peak_bytes"])


def test_what_is_not_trained_is_refused(tmp_path):
    with pytest.raises(ValueError, match="projector or all"):
        training.measure(training.Step(SMALL, "tower"), METHODS, tmp_path / "x")
