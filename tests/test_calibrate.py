"""`python -m eval calibrate`: the mean it promises, on the questions it drew and as results say."""

from __future__ import annotations

import json
import random

import pytest
import torch
from typer.testing import CliRunner

from eval.__main__ import app
from eval.plan.reader import ConfigError
from eval.plan.table import load_table
from eval.run import harness as official
from eval.run.reach import find_reach
from llava_hivtp.answer import prepare_pixels

SAMPLE = 14


@pytest.fixture(scope="module", params=[False, True], ids=["v1.5", "anyres"])
def calibrated(request, tiny, drawn, tmp_path_factory):
    """A table with the row that the command adds, its folder of results, the mean asked for."""
    folder, tiles = tmp_path_factory.mktemp("calibrate"), 5 if request.param else 1
    config = folder / "table.yaml"
    config.write_text(
        f"title: tiny\nmodels: ['{tiny(anyres=request.param)}']\nlayout: unpad\npatches: 16\n"
        "tasks: [pope]\nprotocol: {pope: accuracy}\nrows:\n"
        "  - {id: full, pruner: none, block: 100}\n"
        "  - {id: cover-75, pruner: cover, keep: 0.75, layers: [3], block: 75}\n"
    )
    out, tokens = folder / "out", 4 * tiles
    call(config, drawn, out, "--tokens", tokens, "--write")
    return config, out, tokens


def call(config, data, out, *more):
    arguments = [config, "--row", "cover-75", "--sample", SAMPLE, "--data", data, "--out", out]
    done = CliRunner().invoke(app, ["calibrate", *map(str, (*arguments, *more))])
    assert done.exit_code == 0, done.output
    return done.output


def test_the_mean_is_met_one_by_one_and_in_batches(calibrated, drawn):
    from llava_hivtp.lmms import LlavaHIVTP

    config, _, tokens = calibrated
    table = load_table(config)
    row = table.rows[-1]
    assert abs(row.calibration.reached - tokens) <= 0.5
    lm = LlavaHIVTP(table.model, device_map="cpu")
    lm.model.pruner = row.build()
    instances = official.requests(lm, official.load_task("pope", drawn), None)
    random.Random("calibrate 0").shuffle(instances)
    images = [lm.read(instance).images for instance in instances[:SAMPLE]]
    counts = {}
    for batch in (1, 5):
        counts[batch], tiles = [], []
        for start in range(0, SAMPLE, batch):
            some = [image for each in images[start : start + batch] for image in each]
            with torch.inference_mode():
                packed, _ = lm.model.prune(lm.model.pictures(prepare_pixels(lm.model, some)))
            counts[batch] += [image.patches for image in packed]
            tiles += [image.kept.tile.bincount().tolist() for image in packed]
    assert counts[1] == counts[5]
    assert sum(counts[1]) / SAMPLE == pytest.approx(row.calibration.reached, abs=0.006)
    assert len(set(counts[1])) > 1  # images differ,
    assert all(min(each) >= 1 for each in tiles)
    if len(tiles[0]) > 1:
        assert any(len(set(each)) > 1 for each in tiles)  # and tiles of one image


def test_the_row_is_run_as_it_is_and_says_how_it_was_set(calibrated, drawn):
    config, out, tokens = calibrated
    name = f"cover-75-mean-{tokens}"
    line = config.read_text().splitlines()[-1]
    assert line.startswith(f"  - {{id: {name}, pruner: cover, keep: 0.75, layers: [3], reach: 0.")
    places = [str(config), "--data", str(drawn), "--out", str(out), "--limit", "2"]
    done = CliRunner().invoke(app, ["run", *places, "--rows", f"full {name}", "--no-timing"])
    assert done.exit_code == 0, done.output
    row = load_table(config).rows[-1]
    (file,) = (out / load_table(config).model.split("/")[-1] / row.folder).glob("pope.limit2.json")
    result = json.loads(file.read_text())
    assert result["unit"]["calibrated"] == {
        "task": "pope", "sample": SAMPLE, "seed": 0, "model": row.calibration.model,
        "tokens": tokens, "reached": row.calibration.reached,
    }  # fmt: skip
    samples = file.with_name("pope.limit2.samples.jsonl").read_text().splitlines()
    assert all(json.loads(sample)["patches"] > 0 for sample in samples)
    shown = CliRunner().invoke(
        app, ["table", str(config), "--out", str(out), "--limit", "2"], catch_exceptions=False
    )
    assert f"set for {tokens} on average" in shown.output
    assert f"on {SAMPLE} questions of pope (seed 0)" in shown.output


def test_it_goes_on_after_a_stop_and_adds_the_row_once(calibrated, drawn):
    config, out, tokens = calibrated
    (file,) = (out / "calibrations").glob("cover-pope-*.jsonl")
    whole, text = file.read_text(), config.read_text()
    lines = whole.splitlines()
    file.write_text("\n".join([*lines[:3], lines[3][:20]]))
    assert "is there already" in call(config, drawn, out, "--tokens", tokens, "--write")
    assert config.read_text() == text
    assert [json.loads(x)["total"] for x in file.read_text().splitlines()] == [
        json.loads(x)["total"] for x in lines
    ]


def test_the_value_is_short_and_just_as_far_as_is_asked():
    above = [[0.0, 0.5, 0.8, 0.9], [0.0, 0.7, 0.85, 0.95]]
    assert find_reach(above, 2) == (0.75, 2)
    assert find_reach(above, 1) == (0.25, 1)
    assert find_reach(above, 4) == (0.97, 4) or find_reach(above, 4) == (0.98, 4)
    reach, reached = find_reach(above, 2.5)
    assert 0.8 < reach < 0.85
    assert reached == 2.5


@pytest.mark.parametrize(
    ("above", "tokens", "message"),
    [
        ([[0.0, 0.5]], 3, "the mean can be 1 to 2 tokens here, not 3: the cap"),
        ([[0.0, 0.5]], 0.5, "the mean can be 1 to 2 tokens"),
        ([[0.0, *[0.5] * 9]], 5, "no reach comes nearer to 5 tokens than 1: many patches"),
    ],
)
def test_a_mean_that_cannot_be_is_refused(above, tokens, message):
    with pytest.raises(ValueError, match=message):
        find_reach(above, tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--row", "full", "--tokens", "4"), "none has no reach, cover has"),
        (("--row", "cover-75", "--tokens", "4", "--task", "mme"), "no task 'mme'"),
        (("--row", "cover-75", "--tokens", "4", "--sample", "4000"), "questions about an image"),
    ],
)
def test_what_does_not_fit_is_named(options, message, calibrated, drawn):
    config, out, _ = calibrated
    arguments = ["calibrate", str(config), *options, "--data", str(drawn), "--out", str(out)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    assert message in done.output


def test_a_row_of_a_fixed_number_has_no_calibration(calibrated, tmp_path):
    config = tmp_path / "table.yaml"
    text = calibrated[0].read_text()
    head, _, last = text.rstrip().rpartition("\n")
    fixed = last.replace(f"reach: {load_table(calibrated[0]).rows[-1].arguments['reach']}, ", "")
    config.write_text(f"{head}\n{fixed}\n")
    with pytest.raises(ConfigError, match="keeps a fixed number: leave it out"):
        load_table(config)
    config.write_text(f"{head}\n{last.replace('seed: 0', 'seed: none')}\n")
    with pytest.raises(ConfigError, match="calibrated: seed cannot be 'none'"):
        load_table(config)
    assert load_table(calibrated[0]).rows[-1].section.endswith("%, calibrated")
