"""LLaVA's own trainer on pruned inputs: what it learns, keeps, refuses and goes on from.

Beside transformers 4.37.2 only. Kills and ZeRO (which needs DeepSpeed) are slow:
make test-all TRANSFORMERS=4.37.2
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from llava.model.builder import load_pretrained_model
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.train import train as official
from llava.train.llava_trainer import LLaVATrainer

from eval.untrained.random_llava import random_llava
from llava_hivtp import build_pruner, load
from llava_hivtp.training import trainer
from llava_hivtp.training.__main__ import main
from llava_hivtp.training.merge import merge

ROOT = Path(__file__).parent.parent.parent
HIVTP = ("--pruner", "hivtp", "--pruner_args", "r=2,k=25,c=2")
PROJECTOR = ("--tune_mm_mlp_adapter", "True")
LORA = ("--lora_enable", "True", "--lora_r", "4", "--lora_alpha", "8", "--mm_projector_lr", "1e-3")
HOW = {"projector": PROJECTOR, "lora": LORA}
needs_peft = pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="no PEFT")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint of 4 encoder layers and 16 patches."""
    folder = tmp_path_factory.mktemp("base") / "llava-v1.5-tiny"
    return random_llava(folder, encoder_layers=4, image_size=56)


@pytest.fixture(scope="module")
def samples(tmp_path_factory, photo):
    """A folder of eight conversations, every fourth without an image, in LLaVA's format."""
    folder, found = tmp_path_factory.mktemp("samples"), []
    for i in range(8):
        turns = [("human", "<image>\nWhat?"), ("gpt", f"It is {i}.")]
        turns = [{"from": speaker, "value": text} for speaker, text in turns]
        found.append({"id": f"s{i}", "conversations": turns})
        if i % 4 == 3:
            turns[0]["value"] = "What?"
        else:
            found[i]["image"] = f"{i}.png"
            photo((40 + i, 60), seed=i).save(folder / f"{i}.png")
    (folder / "data.json").write_text(json.dumps(found))
    return folder


def words(base, samples, out, *options):
    given = ["--model_name_or_path", base, "--data_path", samples / "data.json"]
    given += ["--image_folder", samples, "--output_dir", out, "--version", "v1"]
    given += ["--per_device_train_batch_size", 4, "--max_steps", 4, "--logging_steps", 1]
    given += ["--save_steps", 2, "--learning_rate", "1e-2", "--report_to", "none"]
    given += ["--model_max_length", 2048, "--use_cpu", "True", "--disable_tqdm", "True", *options]
    return [str(word) for word in given]


def losses(folder):
    """What `trainer_state.json` says of every step."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]


def weights(folder):
    return torch.load(folder / "mm_projector.bin", map_location="cpu")


@pytest.fixture
def steps(monkeypatch):
    """The method and the kept patches of every step."""
    seen = []

    def on_step_end(self, args, state, control, **others):
        patches = [image.kept.patch.tolist() for image in self.model.kept]
        seen.append((self.model.pruner, patches))

    monkeypatch.setattr(trainer.EveryStep, "on_step_end", on_step_end, raising=False)
    return seen


def test_training_without_pruning_is_stock_training_to_the_bit(
    base, samples, tmp_path, monkeypatch
):
    """Stock rounds the tower to float16 also on a CPU, so ours is left so, too."""
    monkeypatch.setattr(trainer, "_tower_in_float32", lambda model: None)
    ours, stock = tmp_path / "ours", tmp_path / "stock"
    given = words(base, samples, ours, *PROJECTOR, "--pruner", "none", "--save_strategy", "no")
    assert main(given) == 0
    given[given.index(str(ours))] = str(stock)
    given = given[: given.index("--pruner")] + given[given.index("--pruner") + 2 :]
    for name in ("mm_projector_type", "mm_vision_select_layer", "mm_use_im_patch_token"):
        given += [f"--{name}", json.loads((base / "config.json").read_text())[name]]
    given += ["--vision_tower", base / "tower", "--image_aspect_ratio", "pad"]
    monkeypatch.setattr(sys, "argv", ["train", *map(str, given)])
    monkeypatch.chdir(base)  # where stock LLaVA finds the tower
    monkeypatch.setattr(official, "maybe_zero_3", lambda weight, **_: weight.detach().clone())
    monkeypatch.setattr(
        "llava.train.llava_trainer.maybe_zero_3", lambda weight, **_: weight.detach().clone()
    )
    assert official.LLaVATrainer is LLaVATrainer
    assert official.LlavaLlamaForCausalLM is LlavaLlamaForCausalLM
    official.train()
    assert losses(ours) == losses(stock)
    found, expected = weights(ours), weights(stock)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("how", ["projector", pytest.param("lora", marks=needs_peft)])
def test_a_resumed_training_has_the_same_losses(base, samples, tmp_path, how):
    out = tmp_path / "tuned"
    given = words(base, samples, out, *HIVTP, *HOW[how])
    assert main(given) == 0
    whole = losses(out)
    assert len(whole) == 4
    assert len({loss for _, loss in whole}) == 4
    for path in (out / "checkpoint-4").iterdir():
        path.unlink()
    (out / "checkpoint-4").rmdir()
    (out / "trainer_state.json").unlink()
    assert main(given) == 0
    assert losses(out) == whole


@pytest.mark.parametrize("how", ["projector", pytest.param("lora", marks=needs_peft)])
def test_what_was_trained_loads_everywhere(base, samples, tmp_path, how, caplog, monkeypatch):
    out, merged = tmp_path / f"llava-{how}", tmp_path / f"llava-{how}-merged"
    assert main(words(base, samples, out, *HIVTP, *HOW[how])) == 0
    merge(base, out, merged)
    model, *_ = load(merged)
    assert (
        "tuned under HIVTP(layers=(2,), merge=False, weigh=False, r=2, k=25, c=2, fill=False)"
        in caplog.text
    )
    record = model.config.trained_with
    pruner = build_pruner(record["pruner"], **record["arguments"][0])
    caplog.clear()
    assert load(merged, pruner)[0].pruner == pruner
    assert not caplog.text
    before, *_ = load(base)
    changed = {
        name
        for (name, w), old in zip(model.named_parameters(), before.parameters(), strict=True)
        if not torch.equal(w, old)
    }
    assert {name for name in changed if "mm_projector" in name}
    assert bool({name for name in changed if "layers" in name}) == (how == "lora")
    assert not {name for name in changed if "vision_tower" in name}
    # Stock LLaVA: what was trained on top of the base, and the merged checkpoint by itself.
    monkeypatch.chdir(merged)
    _, stock, *_ = load_pretrained_model(str(out), str(base), out.name, device="cpu")
    _, alone, *_ = load_pretrained_model(str(merged), None, "llava", device="cpu")
    assert type(alone) is LlavaLlamaForCausalLM
    ours = dict(model.named_parameters())
    for name, weight in alone.named_parameters():
        if "vision_tower" not in name:
            assert torch.equal(weight, ours[name].half()), name
    for name, weight in stock.named_parameters():  # which merges in float16
        if "vision_tower" not in name:
            torch.testing.assert_close(weight.float(), ours[name], rtol=2e-3, atol=2e-3)


def test_of_several_budgets_each_step_draws_one(base, samples, tmp_path, steps):
    several = ("--pruner", "random", "--pruner_args", "keep=0.25", "keep=0.5", "keep=1.0")
    given = words(base, samples, tmp_path, *PROJECTOR, *several, "--max_steps", 12)
    assert main([*given, "--save_strategy", "no"]) == 0
    kept = [{len(patches) for patches in each} for _, each in steps]
    assert all(
        counts == {int(16 * pruner.keep)} for counts, (pruner, _) in zip(kept, steps, strict=True)
    )
    assert {4, 8, 16} == set().union(*kept)
    before = list(steps)
    steps.clear()
    assert main([*given, "--save_strategy", "no"]) == 0
    assert steps == before


def test_a_seeded_method_draws_anew_in_every_epoch(base, samples, tmp_path, steps):
    given = words(base, samples, tmp_path, *PROJECTOR, "--pruner", "random", "--pruner_args")
    given += ["keep=0.25", "--per_device_train_batch_size", "8", "--max_steps", "3"]
    assert main([*given, "--save_strategy", "no"]) == 0
    assert [pruner.seed for pruner, _ in steps] == [0, 1, 2]
    first, second, third = ({tuple(p) for p in patches} for _, patches in steps)
    assert len(first - second) >= 6
    assert len(first - third) >= 6


BAD = {
    "no list": ({"a": 1}, "must hold a list"),
    "no mapping": (["a"], "sample 0 must be a mapping"),
    "no turns": ([{"id": "x"}], r"sample 0 \(id 'x'\) needs 'conversations'"),
    "wrong speaker": ([{"conversations": [{"from": "gpt", "value": "a"}]}], "turn 0: 'from'"),
    "no answer": ([{"conversations": [{"from": "human", "value": "a"}]}], "no answer"),
    "more turns than the tokenizer takes": (
        [{"conversations": [{"from": who, "value": "a"} for who in ("human", "gpt") * 2]}],
        "sample 0 has 4 turns, .* PreTrainedTokenizerFast",
    ),
    "no text": (
        [{"conversations": [{"from": "human", "value": 1}, {"from": "gpt", "value": "a"}]}],
        "'value' must be text",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_sample_is_named_before_the_first_step(base, samples, tmp_path, kind, capsys, steps):
    content, said = BAD[kind]
    (tmp_path / "data.json").write_text(json.dumps(content))
    given = words(base, samples, tmp_path / "out", *PROJECTOR, *HIVTP)
    given[given.index(str(samples / "data.json"))] = str(tmp_path / "data.json")
    assert main(given) == 1
    error = capsys.readouterr().err
    assert re.search(said, error), error
    assert not steps


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image": "gone.png"}, "sample 5 (id 's5'): "),
        ({"image": "torn.png"}, "torn.png cannot be decoded"),
        ({"image": ["5.png", "6.png"]}, "'image' must name one file"),
        ({"image": None}, "'image' must name one file"),
    ],
)
def test_a_bad_image_is_named_before_the_first_step(
    base, samples, tmp_path, change, said, capsys, steps
):
    whole = (samples / "5.png").read_bytes()
    (samples / "torn.png").write_bytes(whole[: len(whole) // 2])
    found = json.loads((samples / "data.json").read_text())
    found[5] |= change
    (tmp_path / "data.json").write_text(json.dumps(found))
    given = words(base, samples, tmp_path / "out", *PROJECTOR, *HIVTP)
    given[given.index(str(samples / "data.json"))] = str(tmp_path / "data.json")
    assert main(given) == 1
    error = capsys.readouterr().err
    assert said in error
    assert "sample 5" in error
    assert not steps


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--pruner", "hivtq"), "unknown pruner"),
        (("--pruner_args", "keep=2"), "takes no keep"),
        (("--pruner_args", "layers=9"), "outside 1..4"),
        (("--mm_vision_select_layer", "-1"), "leave the argument out"),
        (("--image_aspect_ratio", "anyres"), "LLaVA-NeXT cannot be tuned"),
        (("--data_path", "nowhere.json"), "no file"),
        (("--version", "plain"), "sample 3 (id 's3'): --version plain takes an image"),
        (("--image_folder", "nowhere"), "is no folder"),
    ],
)
def test_bad_arguments_are_refused_before_the_first_step(
    base, samples, tmp_path, options, said, capsys, steps
):
    assert main(words(base, samples, tmp_path, *PROJECTOR, *options)) == 1
    assert said in capsys.readouterr().err
    assert not steps


def test_a_checkpoint_that_the_trainer_cannot_train_is_refused(tmp_path, samples, capsys):
    mistral = random_llava(tmp_path / "m", mistral=True, encoder_layers=4, image_size=56)
    assert main(words(mistral, samples, tmp_path / "out", *PROJECTOR)) == 1
    assert "'llava_mistral'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "script", [("finetune.sh",), ("finetune_lora.sh",), ("slurm/finetune.sbatch", "finetune_lora")]
)
def test_a_dry_run_prints_what_eight_gpus_would_run(script, tmp_path):
    settings = {"DRY_RUN": "1", "NPROC": "8", "ZERO": "3", "DATA": "d.json", "IMAGES": "images"}
    settings["PRUNER_ARGS"] = "r=2,k=25,c=2 r=2,k=14,c=3"
    said = subprocess.run(
        ["bash", ROOT / "scripts" / script[0], *script[1:], "--seed", "1"],
        env=os.environ | settings, capture_output=True, text=True, check=True, cwd=ROOT,
    ).stdout.splitlines()  # fmt: skip
    assert len(said) == 2
    assert "--nproc_per_node 8 -m llava_hivtp.training" in said[0]
    for part in ("zero3.json", "--bf16 True", r"r=2\,k=25\,c=2 r=2\,k=14\,c=3", "--seed 1"):
        assert part in said[0]
    assert ("--lora_enable True" in said[0]) == ("lora" in script[-1])
    assert ("--tune_mm_mlp_adapter True" in said[0]) == ("lora" not in script[-1])
    assert "-m llava_hivtp.training.merge" in said[1]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["projector", pytest.param("lora", marks=needs_peft)])
def test_a_killed_training_goes_on_to_the_same_losses(base, samples, tmp_path, how):
    """A real process, killed by SIGKILL as soon as its first checkpoint is there."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    options = (*HIVTP, *HOW[how], "--max_steps", 60, "--save_steps", 10)

    def start(out):
        given = words(base, samples, out, *options)
        return subprocess.Popen(
            [sys.executable, "-m", "llava_hivtp.training", *given],
            env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    assert start(tmp_path / "whole").wait() == 0
    whole, killed = losses(tmp_path / "whole"), 0
    out = tmp_path / "killed"
    for checkpoint in ("checkpoint-10", "checkpoint-30"):
        job = start(out)
        while job.poll() is None and not (out / checkpoint).is_dir():
            time.sleep(0.01)
        if job.poll() is None:
            os.kill(job.pid, signal.SIGKILL)
            killed += job.wait() == -signal.SIGKILL
    assert killed
    assert not (out / "trainer_state.json").is_file()
    assert start(out).wait() == 0
    assert losses(out) == whole


needs_deepspeed = pytest.mark.skipif(
    not importlib.util.find_spec("deepspeed"), reason="DeepSpeed is not installed"
)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("how", ["projector", pytest.param("lora", marks=needs_peft)])
def test_two_processes_under_zero_learn_what_one_does(base, samples, tmp_path, how, stage):
    """A step is the whole data set, whoever has which half of it; dropout would draw otherwise."""
    environment = {k: v for k, v in os.environ.items() if k != "ACCELERATE_USE_CPU"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    common = (*HIVTP, *HOW[how], "--lora_dropout", 0)

    def train(out, launcher, *options):
        given = words(base, samples, out, *common, *options)
        if launcher:
            del given[given.index("--use_cpu") : given.index("--use_cpu") + 2]
        command = [sys.executable, *launcher, "-m", "llava_hivtp.training", *given]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-9000:]
        merged = merge(base, out, out.with_name(f"{out.name}-merged"))
        return losses(out), dict(load(merged)[0].requires_grad_(False).named_parameters())

    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    config = ROOT / "configs" / "deepspeed" / f"zero{stage}.json"
    one = train(tmp_path / "one", [], "--per_device_train_batch_size", 8)
    spread = train(tmp_path / "two", two, "--deepspeed", config)
    assert spread[0] == [(step, pytest.approx(loss, abs=2e-3)) for step, loss in one[0]]
    moved = 0.0
    for name, weight in load(base)[0].requires_grad_(False).named_parameters():
        moved = max(moved, float((one[1][name] - weight).abs().max()))
        torch.testing.assert_close(spread[1][name], one[1][name], rtol=1e-3, atol=1e-3)
    assert moved > 2e-2
    # and it goes on from its last checkpoint
    again = train(tmp_path / "two", two, "--deepspeed", config, "--max_steps", 6)
    assert again[0][:4] == spread[0]
    assert len(again[0]) == 6
