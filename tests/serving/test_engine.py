"""Around the answers: refusals, cache keys, digests, NaN, tensor parallelism, LoRA."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import engine
from test_answers import CASES, HIVTP, ONE, ask, check

RANDOM = {"pruner": "random", "keep": 0.25}


@pytest.fixture(scope="module")
def expected(checkpoint, pictures):
    from reference import Reference

    reference = Reference(checkpoint("v15"), HIVTP)
    return [reference.ask(prompt, [pictures[i] for i in which]) for prompt, which in CASES]


def processor_of(folder, hivtp, dtype="float32"):
    from vllm.config import ModelConfig
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    overrides = {} if hivtp is None else {"hivtp": hivtp}
    return MULTIMODAL_REGISTRY.create_processor(
        ModelConfig(folder, dtype=dtype, hf_overrides=overrides)
    )


def processed(processor, image, **given):
    items = processor.info.parse_mm_data({"image": [image]})
    ids = processor.info.get_tokenizer().encode(ONE)
    return processor(ids, items, **given)


def model_of(llm):
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.model


@pytest.mark.parametrize(
    ("kind", "hivtp", "message"),
    [
        ("v15", {**HIVTP, "fill": False}, "hivtp with fill=False"),
        ("v15", {"pruner": "prumerge", "keep": 0.5, "layers": [6]}, "vLLM loads only the 5"),
        ("next", {**HIVTP, "layout": "unpad"}, "use inside or mosaic"),
    ],
)
def test_an_engine_that_cannot_know_the_count_does_not_start(checkpoint, kind, hivtp, message):
    with pytest.raises(Exception, match=message), engine(checkpoint(kind), hivtp):
        pass


def test_the_command_says_why_it_does_not_start(checkpoint, command):
    run = subprocess.run(
        [Path(sys.executable).with_name("vllm"), "serve", checkpoint("v15"), "--enforce-eager"]
        + ["--dtype", "float32", "--max-model-len", "1024", "--port", "0"]
        + ["--kv-cache-memory-bytes", str(1 << 26)]
        + ["--hf-overrides", json.dumps({"hivtp": {**HIVTP, "fill": False}})],
        env=command,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode != 0
    assert "hivtp with fill=False keeps a number of tokens" in run.stdout + run.stderr


@pytest.mark.parametrize("kind", ["v15", "next"])
def test_without_the_key_all_is_stock(checkpoint, kind):
    processor = processor_of(checkpoint(kind), None)
    assert type(processor).__module__.startswith("vllm.")
    assert type(processor.info).__module__.startswith("vllm.")


@pytest.mark.parametrize("kind", ["v15", "next"])
def test_a_cache_key_knows_the_method_also_where_the_client_names_the_image(
    checkpoint, pictures, kind
):
    from vllm.multimodal.parse import MultiModalUUIDItems  # noqa: F401

    every = []
    for hivtp in (None, HIVTP, {**HIVTP, "k": 24}, RANDOM):
        processor = processor_of(checkpoint(kind), hivtp)
        every.append(processed(processor, pictures[0])["mm_hashes"]["image"][0])
        named = processed(processor, pictures[0], mm_uuid_items={"image": ["photo"]})
        every.append(named["mm_hashes"]["image"][0])
    assert len(set(every)) == len(every)
    assert every[1] == "photo"  # stock


@pytest.mark.parametrize("kind", ["v15", "next"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_digest_is_of_the_pixels_before_any_cast(checkpoint, pictures, kind, dtype):
    from transformers import AutoProcessor

    found = processed(processor_of(checkpoint(kind), {**RANDOM}, dtype), pictures[3])
    (item,) = found["mm_kwargs"]["image"]
    pixels = AutoProcessor.from_pretrained(checkpoint(kind)).image_processor(
        pictures[3], return_tensors="pt"
    )["pixel_values"]
    assert item["pixel_values"].data.dtype == getattr(torch, dtype)
    assert int(item["pixel_digest"].data) == zlib.crc32(pixels.contiguous().numpy())


def test_pixels_that_are_no_numbers_fail_their_own_request_only(checkpoint, pictures, expected):
    with engine(checkpoint("v15"), HIVTP) as llm:
        bad = np.full((56, 56, 3), np.nan, np.float32)
        with pytest.raises(ValueError, match="NaN or infinity"):
            ask(llm, [bad], [(ONE, [0])])
        (output,) = ask(llm, pictures, CASES[:1])
        check(output, expected[0])


def test_nan_in_the_tower_spoils_one_answer_only(checkpoint, pictures, expected, caplog):
    with engine(checkpoint("v15"), HIVTP) as llm:
        chooser = model_of(llm).chooser
        stock = chooser.tower

        class Tower(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.vision_model = stock.vision_model

            def forward(self, pixels, **given):
                hidden = stock(pixels, **given)
                flat = pixels.flatten(2).std(2).amax(1) < 1e-5  # a picture of one colour
                hidden[flat] = torch.nan
                return hidden

        chooser.tower = Tower()
        from PIL import Image

        album = [*pictures, Image.new("RGB", (56, 56), "red")]
        with caplog.at_level(logging.ERROR):
            good, *_ = ask(llm, album, [CASES[0], (ONE, [6])], logprobs=None)
        assert list(good.outputs[0].token_ids) == expected[0][1]
        assert "NaN or infinity in the vision tower" in caplog.text
        for output, wanted in zip(ask(llm, pictures, CASES), expected, strict=True):
            check(output, wanted)


@pytest.mark.parametrize("mode", ["weights", "data"])
def test_two_ranks_choose_alike(checkpoint, pictures, expected, mode, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    parallel = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    with engine(checkpoint("v15"), HIVTP, **parallel, mm_encoder_tp_mode=mode) as llm:
        for output, wanted in zip(ask(llm, pictures, CASES), expected, strict=True):
            check(output, wanted)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Folder of a LoRA adapter on the language model's q_proj, and its change to the weights."""
    from safetensors.torch import save_file

    folder, rng = tmp_path_factory.mktemp("adapter"), torch.Generator().manual_seed(5)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    weights, changes = {}, {}
    for layer in range(2):
        down, up = torch.randn(4, 128, generator=rng), torch.randn(128, 4, generator=rng)
        name = f"model.language_model.layers.{layer}.self_attn.q_proj"
        weights[f"base_model.model.{name}.lora_A.weight"] = down * 0.1
        weights[f"base_model.model.{name}.lora_B.weight"] = up * 0.1
        changes[f"{name}.weight"] = 8 / 4 * (up * 0.1) @ (down * 0.1)
    save_file(weights, folder / "adapter_model.safetensors")
    return str(folder), changes


def test_lora_on_the_language_model_goes_with_it(checkpoint, pictures, expected, adapter):
    from reference import Reference
    from vllm.lora.request import LoRARequest

    folder, changes = adapter
    reference = Reference(checkpoint("v15"), HIVTP)
    for name, change in changes.items():
        reference.model.get_parameter(name).data += change
    adapted = [reference.ask(prompt, [pictures[i] for i in which]) for prompt, which in CASES[:3]]
    assert [tokens for _, tokens, _ in adapted] != [tokens for _, tokens, _ in expected[:3]]
    with engine(checkpoint("v15"), HIVTP, enable_lora=True, max_lora_rank=8) as llm:
        lora = LoRARequest("adapter", 1, folder)
        for output, wanted in zip(ask(llm, pictures, CASES[:3], lora=lora), adapted, strict=True):
            check(output, wanted)
        for output, wanted in zip(ask(llm, pictures, CASES[:3]), expected, strict=False):
            check(output, wanted)


def test_lora_on_the_tower_is_refused(checkpoint):
    both = {"enable_lora": True, "enable_tower_connector_lora": True}
    with (
        pytest.raises(Exception, match="does not go with"),
        engine(checkpoint("v15"), HIVTP, **both),
    ):
        pass
