"""What was trained, as a checkpoint like any other: it says under which method, and forces none."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from eval.untrained.random_llava import random_llava
from llava_hivtp import build_pruner, load
from llava_hivtp.loading import TRAINED_WITH
from llava_hivtp.training.merge import main

HIVTP = {"r": 2, "k": 25, "c": 2, "layers": [2, 3], "fill": False}
NAME = "HIVTP(layers=(2, 3), merge=False, weigh=False, r=2, k=25, c=2, fill=False)"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "base"
    return random_llava(folder, encoder_layers=4, image_size=56)


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    """What a training of the projector alone leaves behind."""
    folder = tmp_path_factory.mktemp("tuned")
    settings = json.loads((base / "config.json").read_text())
    settings |= {"image_aspect_ratio": "square", "tokenizer_model_max_length": 64}
    settings[TRAINED_WITH] = {"pruner": "hivtp", "arguments": [HIVTP]}
    (folder / "config.json").write_text(json.dumps(settings))
    weights = load_file(base / "model.safetensors")
    torch.save(
        {name: weight + 1 for name, weight in weights.items() if "mm_projector" in name},
        folder / "mm_projector.bin",
    )
    return folder


@pytest.fixture(scope="module")
def merged(base, tuned, tmp_path_factory):
    out = tmp_path_factory.mktemp("merged") / "llava-merged"
    assert main([str(base), str(tuned), str(out)]) == 0
    return out


def test_only_what_was_trained_differs_from_the_base(base, merged):
    before, after = (load_file(folder / "model.safetensors") for folder in (base, merged))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert after[name].dtype == weight.dtype
        assert torch.equal(after[name], weight + 1 if "mm_projector" in name else weight), name
    assert {file.name for file in (merged / "tower").iterdir()} == {
        file.name for file in (base / "tower").iterdir()
    }


def test_its_config_is_the_base_with_what_it_was_trained_with(base, merged):
    before, after = (json.loads((f / "config.json").read_text()) for f in (base, merged))
    assert after[TRAINED_WITH] == {"pruner": "hivtp", "arguments": [HIVTP]}
    assert after["image_aspect_ratio"] == "square"
    # The length that the trainer cuts at is none that answers should be cut at.
    assert after.get("tokenizer_model_max_length") == before.get("tokenizer_model_max_length")
    assert after["architectures"] == ["LlavaLlamaForCausalLM"]
    assert after["mm_vision_tower"] == "tower"


def test_the_method_is_proposed_and_not_forced(merged, caplog):
    model, *_ = load(merged)
    assert model.pruner == build_pruner("none")
    assert caplog.messages == [
        f"{merged} was tuned under {NAME}; it runs under {build_pruner('none')}"
    ]
    caplog.clear()
    load(merged, build_pruner("hivtp", **HIVTP))
    assert not caplog.messages


def test_a_method_that_is_not_here_is_said_to_be_absent(merged, caplog, tmp_path):
    settings = json.loads((merged / "config.json").read_text())
    settings[TRAINED_WITH]["pruner"] = "gone.py:Gone"
    for file in merged.iterdir():
        if file.name != "config.json":
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    load(tmp_path)
    (said,) = caplog.messages
    assert "cannot be built here" in said
    assert "gone.py" in said


def test_transformers_own_classes_propose_it_too(merged, tmp_path, caplog):
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("transformers 4 has no such classes")
    from llava_hivtp.convert import to_transformers

    to_transformers(merged, tmp_path, dtype="float32")
    caplog.clear()
    model, *_ = load(tmp_path)
    assert type(model).stock is transformers.LlavaForConditionalGeneration
    assert [message.split(";")[0] for message in caplog.messages] == [
        f"{tmp_path} was tuned under {NAME}"
    ]
    theirs = model.model.multi_modal_projector.linear_1.weight
    official, *_ = load(merged)
    assert torch.equal(theirs, official.get_model().mm_projector[0].weight)


def test_a_folder_without_anything_trained_is_refused(base, tmp_path, capsys):
    assert main([str(base), str(base), str(tmp_path / "out")]) == 1
    assert "nothing to merge" in capsys.readouterr().err


def test_weights_of_another_model_are_refused(base, tuned, tmp_path, capsys):
    for file in tuned.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({"model.mm_projector.9.weight": torch.ones(1)}, tmp_path / "mm_projector.bin")
    assert main([str(base), str(tmp_path), str(tmp_path / "out")]) == 1
    assert "mm_projector.9.weight" in capsys.readouterr().err
