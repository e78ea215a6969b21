"""The embedded model, written for transformers' own classes, gives the same answers."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from eval.__main__ import app
from eval.efficiency.cases import Case
from eval.efficiency.inputs import make_inputs
from eval.efficiency.request import run_request, sizes_of
from eval.efficiency.stopwatch import STAGES
from eval.explorer.shared import SharedModel
from eval.figures.look import cropped_to, look
from eval.nano import CHECKPOINTS, converted
from eval.nano.converted import DIFFER, Comparison, compare
from eval.nano.draw import draw, draw_large
from eval.nano.questions import color_of, shape_of
from eval.nano.text import SHORT
from eval.untrained import shapes
from llava_hivtp import attach, load
from llava_hivtp.answer import prompt_ids
from llava_hivtp.conversation import build_prompt
from llava_hivtp.images import prepare_images
from llava_hivtp.pruners import Pruner, for_depth, read_pruner

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", params=["nodrop", "anyres"])
def pair(request, tmp_path_factory):
    """(official, converted), each as `load` gives it; converted by the command."""
    out = tmp_path_factory.mktemp("converted")
    command = [sys.executable, "-m", "eval.nano", "convert", "--out", out]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(
        [*map(str, command), "--variant", request.param], check=True, cwd=ROOT, env=environment
    )
    folders = (CHECKPOINTS / request.param, out / request.param)
    return [load(folder, device_map="cpu") for folder in folders]


def asked(count):
    """Questions of one word about fresh pictures."""
    rng = random.Random(5)
    while count:
        picture = draw(rng, "scene")
        question = (color_of, shape_of)[count % 2](rng, picture)
        if question:
            count -= 1
            yield picture.image, f"{question.text}\n{SHORT}"


@pytest.mark.parametrize("text", ["none", "hivtp", "visionzip:keep=0.25"])
def test_the_converted_model_answers_as_the_official_one(pair, text):
    from llava.mm_utils import tokenizer_image_token

    (official, tokenizer, images, _), (converted, _, processor, _) = pair
    for model in (official, converted):
        attach(model, for_depth(read_pruner(text), 12))
    answers = set()
    for image, question in asked(12):
        prompt = build_prompt("vicuna_v1", question, 1)
        ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")[None]
        pixels, sizes = prepare_images([image], images, official.config)
        theirs = official.generate(ids, images=pixels, image_sizes=sizes, max_new_tokens=4)
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}])
        assert text == prompt
        batch = processor(text=[text], images=[image], return_tensors="pt")
        assert torch.equal(batch["pixel_values"], pixels)
        ours = converted.generate(**batch, max_new_tokens=4)[0, batch["input_ids"].shape[1] :]
        said = tokenizer.decode(theirs[0], skip_special_tokens=True)
        assert processor.decode(ours, skip_special_tokens=True) == said
        assert torch.equal(official.kept[0].kept.patch, converted.kept[0].kept.patch)
        assert len(converted.kept) == 1
        answers.add(said)
    assert len(answers) > 2


def test_answers_come_from_the_chat_template(pair):
    from llava_hivtp.answer import Request, answer, answer_batch

    (official, words, *_), (converted, tokenizer, *_) = pair
    for model in (official, converted):
        attach(model, for_depth(read_pruner("hivtp"), 12))
    requests = [Request(question, {"max_new_tokens": 4}, (image,)) for image, question in asked(4)]
    theirs = answer_batch(official, words, requests, "vicuna_v1")
    ours = answer_batch(converted, tokenizer, requests, "vicuna_v1")
    assert ours == theirs
    assert all(found.text and found.patches for found in ours)
    alone = answer(converted, tokenizer, requests[0].images[0], requests[0].question)
    assert alone.text == ours[0].text
    assert alone.ttft > 0
    text = [Request("Hello", {"max_new_tokens": 2})]
    theirs = answer_batch(official, words, text, "vicuna_v1")
    assert answer_batch(converted, tokenizer, text, "vicuna_v1") == theirs
    with pytest.raises(ValueError, match="2 marks <image> for 1 images"):
        answer_batch(converted, tokenizer, [Request("<image> <image>", {}, requests[0].images)], "")


def test_the_command_answers_with_the_converted_model(pair, tmp_path, capsys):
    from llava_hivtp import cli

    image, question = next(asked(1))
    image.save(tmp_path / "picture.png")
    folder = pair[1][0].config._name_or_path
    assert cli.main(["answer", str(tmp_path / "picture.png"), question, "--model", folder]) == 0
    assert "hivtp" in capsys.readouterr().out


def test_the_plug_in_names_the_chat_template_in_the_protocol(pair):
    from llava_hivtp.lmms import LlavaHIVTP

    folder = pair[1][0].config._name_or_path
    model = LlavaHIVTP(pretrained=folder, pruner="none", device="cpu")
    assert model.conv_template.startswith("chat template ")
    with pytest.raises(ValueError, match="brings its own chat template"):
        LlavaHIVTP(pretrained=folder, conv_template="vicuna_v1", device="cpu")


def test_a_table_of_the_converted_model_is_run_and_shown(pair, drawn, tmp_path):
    model = pair[1][0].config._name_or_path
    official = ROOT / "configs" / "nano" / f"table{1 + ('anyres' in model)}.yaml"
    config = tmp_path / "table.yaml"
    config.write_text(f"like: {official}\ntitle: T\nmodels: [{model}]\nlayout: unpad\n")
    rows = [str(config), "--rows", "full hivtp-25", "--limit", "2", "--out", str(tmp_path / "out")]
    asked = [*rows, "--tasks", "pope"]
    for call in (["run", *asked, "--data", str(drawn), "--timing-n", "1"], ["status", *asked]):
        done = CliRunner().invoke(app, call)
        assert done.exit_code == 0, done.output
    assert "2 units, 2 done, 0 stale" in done.output
    shown = CliRunner().invoke(app, ["table", *rows])
    assert shown.exit_code == 0, shown.output
    assert "DRY RUN" in shown.output


def test_a_model_without_one_number_of_patches_is_no_tables(tmp_path):
    vision = {"depth": 27, "patch_size": 16}
    config = {"model_type": "qwen3_vl", "vision_config": vision}
    (tmp_path / "config.json").write_text(json.dumps(config))
    call = ["run", str(ROOT / "configs" / "table1.yaml"), "--model", str(tmp_path), "--dry-run"]
    said = " ".join(CliRunner().invoke(app, call).output.split())
    assert "every image has a grid of its own there" in said


@pytest.mark.parametrize("text", ["hivtp", "visionzip:keep=0.25", "cdpruner:keep=0.25"])
def test_figures_show_the_same_of_both(pair, text):
    rng, pruner = random.Random(7), for_depth(read_pruner(text), 12)
    for size in ((288, 216), (100, 240)):
        image, looks = draw_large(rng, "scene", (288, 216)).image.resize(size), []
        for model, tokenizer, *_ in pair:
            prompt = prompt_ids(model, tokenizer, "What color is the circle?")
            looks.append(look(model, image, (1, 12), pruner, prompt))
        official, converted = looks
        assert np.array_equal(official.stages, converted.stages)
        assert torch.equal(official.packed.kept.patch, converted.packed.kept.patch)
        assert official.packed.patches == converted.packed.patches > 0
        for layer in (1, 12):
            assert np.array_equal(official.importance[layer], converted.importance[layer])
        for one, other in zip(official.sheets, converted.sheets, strict=True):
            assert (one.title, one.n) == (other.title, other.n)
            for name in ("pixels", "index", "inside"):
                assert np.array_equal(getattr(one, name), getattr(other, name))
        assert len({cropped_to(model, size) for model, *_ in pair}) == 1


@pytest.mark.slow
def test_the_command_draws_the_same_figures_of_both(pair, tmp_path):
    image, question = next(asked(1))
    image.save(tmp_path / "picture.png")
    drawn = []
    for model, *_ in pair:
        out, call = tmp_path / f"{len(drawn)}", ["figures", str(tmp_path / "picture.png")]
        call += ["--question", question, "--model", model.config._name_or_path, "--out", str(out)]
        done = CliRunner().invoke(app, call)
        assert done.exit_code == 0, done.output
        drawn.append({file.name: file.read_bytes() for file in out.glob("*.png")})
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 4


def test_the_page_shows_and_answers_the_same_of_both(pair):
    (image, question), found = next(asked(1)), []
    for model, tokenizer, *_ in pair:
        shared = SharedModel(model, tokenizer)
        assert shared.layouts[0] == "unpad"
        pruner = shared.pruner("hivtp", 2, 25, "2", 50, shared.default_layers("hivtp"))
        answers = shared.answers(image, question, pruner, "unpad")
        drawings = shared.draw(image, question, pruner, "unpad"), shared.heat(image, pruner)
        found.append(
            [[timed.answer for timed in answers], [one.tobytes() for one in drawings]]
            + [shared.depth, shared.side, shared.tiled, shared.notes(image, "Is it a zebra?")]
        )
    assert found[0] == found[1]


@pytest.mark.parametrize("verb", ["figures --model", "explore --model", "efficiency"])
def test_towers_without_tiles_are_refused(tmp_path, verb):
    done = CliRunner().invoke(app, [*verb.split(), str(tmp_path)])
    assert done.exit_code == 1
    assert "holds no config.json" in " ".join(done.output.split())
    config = {"model_type": "qwen2_5_vl", "vision_config": {"model_type": "qwen2_5_vl"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = CliRunner().invoke(app, [*verb.split(), str(tmp_path)])
    assert done.exit_code == 1
    said = " ".join(done.output.split())
    assert f"{verb.split()[0]} takes official LLaVA checkpoints and transformers' LLaVA" in said
    assert "is a qwen2_5_vl on a qwen2_5_vl" in said


def test_requests_are_of_one_size_and_are_timed_by_stage(pair):
    quarter = for_depth(read_pruner("hivtp:r=2,k=25,c=none"), 12)
    cases, found = [Case("stock", None), Case("none", Pruner()), Case("quarter", quarter)], []
    for model, *_ in pair:
        inputs = make_inputs(model, (288, 216), 2, 20)
        runs = [run_request(model, case, inputs, 3) for case in cases]
        assert all(tuple(run.stages) == STAGES and len(run.tokens) == 3 for run in runs)
        assert all(seconds >= 0 for run in runs for seconds in run.stages.values())
        sizes = []
        for case in cases:
            run = run_request(model, case, inputs, 1)
            sizes.append(sizes_of(model, case, inputs, run))
        assert sizes[0].length == sizes[1].length > sizes[2].length
        # transformers' vocabulary has the placeholder, too.
        shape = replace(shapes.shape_of(attach(model)), vocab=0)
        found.append((sizes, shape, inputs.tiles, inputs.text))
    assert found[0] == found[1]


def test_the_converted_model_is_timed_by_the_command(pair, tmp_path):
    model = pair[1][0].config._name_or_path
    call = ["efficiency", model, "--method", "hivtp:r=2,k=25,c=2,layers=4+5", "--rounds", "1"]
    call += ["--size", "288x216", "--text", "20", "--new-tokens", "2"]
    done = CliRunner().invoke(app, [*call, "--out", str(tmp_path / "timed")])
    assert done.exit_code == 0, done.output
    assert len((tmp_path / "timed.csv").read_text().splitlines()) == 1 + 3
    for more, words in (("--graphs", "records official LLaVA only"), ("--layout=mosaic", "mosaic")):
        done = CliRunner().invoke(app, [*call, more])
        assert done.exit_code == 1
        assert words in " ".join(done.output.split())


@pytest.mark.parametrize("until", ["ASSISTANT:", "USER", "e"])
def test_a_stop_string_ends_an_answer_not_the_prompt_that_holds_it(pair, until):
    """TextVQA's is "ASSISTANT:", which stands in every prompt of Vicuna."""
    from llava_hivtp.answer import Request, answer_batch

    found = []
    for model, tokenizer, *_ in pair:
        attach(model)
        options = ({"max_new_tokens": 6}, {"max_new_tokens": 6, "until": [until]})
        requests = [[Request(q, each, (image,)) for image, q in asked(6)] for each in options]
        free, ended = (answer_batch(model, tokenizer, each, "vicuna_v1") for each in requests)
        assert [a.text for a in ended] == [a.text.partition(until)[0] for a in free]
        assert until != "e" or any(until in a.text for a in free)
        found.append(ended)
    assert found[0] == found[1]


def test_lmms_eval_gets_the_same_answers_and_asks_no_request_twice(tmp_path, monkeypatch):
    part = Comparison(tmp_path / "asked", rows="hivtp-25", limit=2)
    compare([part], tmp_path / "first.md")
    monkeypatch.delattr(converted, "LlavaHIVTP")  # now nothing can be asked
    found = list(part.counts())
    assert len(found) == 8
    assert {row["requests"] for row in found} == {2}
    assert not any(row[name] for row in found for name in DIFFER)
    file = part.file_of("hivtp-25", "transformers")
    stored = json.loads(file.read_text())
    stored["tasks"]["pope"][1][0] += "?"
    file.write_text(json.dumps(stored))
    text = compare([part], tmp_path / "second.md")
    sums = [cell.strip() for cell in text.splitlines()[-1].strip("|").split("|")]
    assert sums == ["all", "", "", "16", "", "1", "0", "0"]
    assert (tmp_path / "second.md").read_text() == text
