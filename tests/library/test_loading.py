"""Checkpoints load whole or not at all."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest
import torch
from ask import generate
from safetensors.torch import load_file, save_file

from llava_hivtp import load
from llava_hivtp.pruners import HIVTP


@pytest.fixture
def copy_of(checkpoints, tmp_path):
    def get(kind):
        return shutil.copytree(checkpoints(kind), tmp_path / kind)

    return get


def reshape(path, name, shape):
    weights = load_file(path)
    weights[name] = torch.zeros(shape)
    save_file(weights, path, metadata={"format": "pt"})


class Poison:
    """Code that a careless reader of the file would run."""

    def __reduce__(self):
        return (pytest.fail, ("the pickle was run",))


def poison(folder):
    torch.save({"weight": Poison()}, as_bin(folder))


def cut(path):
    """What an interrupted download leaves."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def drop(path, name):
    weights = load_file(path)
    del weights[name]
    save_file(weights, path, metadata={"format": "pt"})


def edit(folder, **changes):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | changes))


def as_bin(folder):
    """The same checkpoint as LLaVA-v1.5's on the hub is stored: pickled, not safetensors."""
    for path in (folder / "model.safetensors", folder / "tower" / "model.safetensors"):
        torch.save(load_file(path), path.with_name("pytorch_model.bin"))
        path.unlink()
    return folder / "pytorch_model.bin"


def test_pickled_checkpoints_load_alike(copy_of, loaded):
    folder = copy_of("v15")
    as_bin(folder)
    ours, theirs = load(folder, device_map="cpu")[0].state_dict(), loaded("v15")[0].state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", ["v15", "next", "mistral"])
def test_every_weight_is_the_checkpoints(checkpoints, kind):
    model, _, _, context = load(checkpoints(kind), device_map="cpu")
    weights = load_file(checkpoints(kind) / "model.safetensors")
    ours = {name.replace(".vision_model.", "."): w for name, w in model.state_dict().items()}
    for name, weight in weights.items():
        assert torch.equal(ours[name.replace(".vision_model.", ".")], weight), name
    assert context == 2048
    assert not model.training


def test_a_tuned_tower_comes_from_the_checkpoint_not_from_its_base(copy_of):
    folder = copy_of("next")
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = next(n for n in weights if "tower" in n and n.endswith("layers.3.mlp.fc1.weight"))
    model = load(folder, device_map="cpu")[0]
    tower = model.get_vision_tower().vision_tower.state_dict()
    tuned = next(w for n, w in tower.items() if n.endswith("layers.3.mlp.fc1.weight"))
    assert torch.equal(tuned, weights[name])


def test_the_folder_may_move(copy_of, photo):
    llava = load(copy_of("v15"), "hivtp", device_map="cpu")[:3]
    assert generate(*llava, [photo((336, 336))], "<image>")
    assert isinstance(llava[0].pruner, HIVTP)


def test_pixels_come_from_the_pil_processor(loaded):
    processor = loaded("v15")[2]
    assert type(processor).__name__ in ("CLIPImageProcessor", "CLIPImageProcessorPil")
    assert "torchvision" not in repr(type(processor).__mro__).lower()


def test_dtype_and_attention_are_as_asked(checkpoints):
    model = load(
        checkpoints("v15"), device_map="cpu", dtype="bfloat16", attn_implementation="eager"
    )[0]
    assert model.dtype == model.get_vision_tower().dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, torch.device("cpu")])
def test_without_a_gpu_weights_are_float32(checkpoints, device_map):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert load(checkpoints("v15"), device_map=device_map)[0].dtype == torch.float32


def test_a_tokenizer_as_vicuna_ships_it(copy_of, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text("USER: what is in the image? ASSISTANT: a red square\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=40,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    folder = copy_of("v15")
    (folder / "tokenizer.json").unlink()
    shutil.copy(tmp_path / "tokenizer.model", folder)
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True}
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | special))
    tokenizer = load(folder, device_map="cpu")[1]
    ids = tokenizer("a red square").input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "a red square"


@pytest.mark.parametrize(
    ("break_it", "error", "message"),
    [
        (lambda f: (f / "config.json").unlink(), FileNotFoundError, "no config.json"),
        (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, "holds no weights"),
        (lambda f: shutil.rmtree(f / "tower"), FileNotFoundError, "vision tower tower is not here"),
        (lambda f: edit(f, architectures=["GPT2"]), ValueError, r"\['GPT2'\]; supported are"),
        (lambda f: edit(f, mm_vision_tower=None), ValueError, "names no mm_vision_tower"),
        (lambda f: edit(f, mm_vision_tower=5), ValueError, "mm_vision_tower must be .* got 5"),
        (lambda f: (f / "config.json").write_text("[]"), ValueError, "json holds no JSON object"),
        (lambda f: (f / "config.json").write_text("{"), ValueError, "config.json is no JSON"),
        (
            lambda f: (f / "tokenizer.json").write_text("{}"),
            ValueError,
            "tokenizer in .* cannot",
        ),
        (lambda f: edit(f, s2=True), ValueError, "S2 towers see several scales"),
        (lambda f: edit(f / "tower", model_type="siglip"), ValueError, "is a siglip; only CLIP"),
        (lambda f: (f / "tower/model.safetensors").unlink(), FileNotFoundError, "tower cannot be"),
        (lambda f: cut(f / "tower/model.safetensors"), FileNotFoundError, "tower cannot be read"),
        (lambda f: cut(as_bin(f)), FileNotFoundError, "cannot be read.*fetch the checkpoint again"),
        (
            lambda f: drop(
                f / "tower/model.safetensors", "vision_model.encoder.layers.1.mlp.fc1.bias"
            ),
            ValueError,
            "tower lacks 1 weights, such as .*encoder.layers.1.mlp.fc1.bias",
        ),
    ],
)
def test_incomplete_checkpoints_are_refused(copy_of, break_it, error, message):
    folder = copy_of("v15")
    break_it(folder)
    with pytest.raises(error, match=message):
        load(folder, device_map="cpu")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "llava"}, "the processor in .* cannot be read|needs transformers 5.18"),
        ({"model_type": "blip-2"}, "names no mm_vision_tower.*its model_type 'blip-2' is none of"),
        ({}, "None is none of transformers' .*LlavaForConditionalGeneration"),
    ],
)
def test_a_checkpoint_of_other_classes_says_what_is_supported(copy_of, settings, message):
    folder = copy_of("v15")
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message):
        load(folder, device_map="cpu")


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'][:]
)
def test_a_broken_index_of_shards_is_named(copy_of, text):
    folder = copy_of("v15")
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="model.safetensors.index.json .*fetch the checkpoint"):
        load(folder, device_map="cpu")


@pytest.mark.parametrize("file", ["model.safetensors", "tower/model.safetensors"])
def test_a_weight_of_another_shape_is_named(copy_of, file):
    folder = copy_of("v15")
    end = "layers.1.mlp.fc1.bias" if file.startswith("tower") else "mm_projector.0.bias"
    name = next(name for name in load_file(folder / file) if name.endswith(end))
    reshape(folder / file, name, (3,))
    named = r"the weight .*\.bias has shape \(3,\), .*asks for"
    on_4 = r"a weight has another shape than .*config.json asks for.*\n?.*\[3\].*bias|bias.*\[3\]"
    with pytest.raises(ValueError, match=f"{named}|{on_4}"):
        load(folder, device_map="cpu")


def test_weights_that_hold_code_are_not_run_and_no_way_to_run_them_is_shown(copy_of):
    folder = copy_of("v15")
    poison(folder)
    with pytest.raises(ValueError, match="hold more than tensors; nothing of it was run") as found:
        load(folder, device_map="cpu")
    assert "weights_only" not in str(found.value)
    assert found.value.__suppress_context__


@pytest.mark.parametrize("path", [None, 5, ["a"], b"folder"])
def test_a_path_that_is_none_is_refused(path):
    with pytest.raises(TypeError, match="path must be a folder or a hub id, got"):
        load(path)


def test_missing_shards_are_named(copy_of):
    folder = copy_of("v15")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2-of-2.safetensors"}})
    )
    with pytest.raises(FileNotFoundError, match="model-2-of-2.safetensors"):
        load(folder, device_map="cpu")


def test_a_half_downloaded_file_is_refused(copy_of):
    folder = copy_of("v15")
    cut(folder / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="cannot be read.*fetch the checkpoint again"):
        load(folder, device_map="cpu")


def test_missing_weights_are_never_random(copy_of):
    folder = copy_of("next")
    drop(folder / "model.safetensors", "model.mm_projector.2.weight")
    with pytest.raises(ValueError, match=r"lacks 1 weights, such as model.mm_projector.2.weight"):
        load(folder, device_map="cpu")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": "int8"}, ValueError, "dtype must be float32"),
        ({"quantization": "2bit"}, ValueError, "'8bit', '4bit' or None, got '2bit'"),
        ({"layout": "rows"}, ValueError, "layout must be one of"),
        ({"pruner": "hivpt"}, ValueError, "unknown pruner 'hivpt'"),
        ({"attn_implementation": "fast"}, ValueError, "attn_implementation must be"),
        ({"pruner": 5}, TypeError, "a Pruner or its name is needed, got 5"),
        ({"device_map": "moon"}, ValueError, "device_map must be a device, .*'moon'"),
    ],
)
def test_bad_options_are_refused_before_any_weight_is_read(checkpoints, options, error, message):
    with pytest.raises(error, match=message):
        load(checkpoints("v15"), **{"device_map": "cpu"} | options)


def test_absent_packages_are_named(checkpoints):
    if importlib.util.find_spec("flash_attn") is None:
        with pytest.raises(ImportError, match=r"llava_hivtp\[flash\]"):
            load(checkpoints("v15"), attn_implementation="flash_attention_2")
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(ImportError, match="pip install bitsandbytes"):
            load(checkpoints("v15"), quantization="4bit")


def test_an_unknown_id_says_how_to_fetch_it():
    with pytest.raises(FileNotFoundError, match="eval prefetch"):
        load("nobody/llava-nothing")
