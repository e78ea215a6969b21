"""`llava-hivtp answer`: one image, one question, full and pruned."""

from __future__ import annotations

import os
import random
import re
from pathlib import Path

import pytest
import tomllib
from PIL import Image

from eval.nano import EMBEDDED
from eval.nano.draw import draw
from eval.plan.table import load_table
from llava_hivtp import build_pruner, cli
from llava_hivtp.answer import Answer
from llava_hivtp.pruners import for_depth

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "scene.webp"
    draw(random.Random(5), "scene").image.save(path, lossless=True)
    return str(path)


def test_full_and_pruned_answers_stand_side_by_side(image, capsys):
    assert cli.main(["answer", image, "What color is the square?"]) == 0
    head, answer, tokens, first, spread = capsys.readouterr().out.splitlines()
    assert head.split() == ["full", "hivtp"]
    assert answer.split() == ["answer", "white", "white"]
    assert tokens.split("  ")[-1].strip().endswith("of 144")
    assert "144 of 144" in tokens
    assert first.count("ms") == 2
    assert re.fullmatch(r"of 3 requests +\d+ to \d+ ms +\d+ to \d+ ms", spread)


def test_arguments_reach_the_pruner(image, capsys):
    arguments = ["--pruner", "random", "--pruner-args", "keep=0.25"]
    assert cli.main(["answer", image, "What color is the square?", *arguments]) == 0
    assert "36 of 144" in capsys.readouterr().out


def test_long_answers_are_wrapped():
    texts = {"full": "word " * 30, "hivtp": "one"}
    answers = {k: (Answer(v, 30, patches=1, total=2), [0.1]) for k, v in texts.items()}
    lines = cli._side_by_side(answers).splitlines()
    assert max(map(len, lines)) < 100
    assert sum(line.count("word") for line in lines) == 30


def test_words_the_model_cannot_read_are_named(image, capsys):
    cli.main(["answer", image, "What color is the elephant?"])
    assert "no token for elephant" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.png", "What?"], "missing.png"),
        (["IMAGE", "What?", "--pruner", "hivpt"], "choose from"),
        (["IMAGE", "What?", "--pruner-args", "k"], "key=value"),
        (["IMAGE", "What?", "--model", "no/such-model"], "no checkpoint"),
        (["IMAGE", "What?", "--layout", "round"], "layout must be"),
        (["IMAGE", "What?", "--pruner-args", "r=2,r=3"], "r comes twice in 'r=2,r=3'"),
        (["IMAGE", "What?", "--pruner", "mine:Method"], "put the folder of its package on PYTHONP"),
        (["IMAGE", "What?", "--max-new-tokens", "0"], "max_new_tokens must be"),
        (["/dev/zero", "What?"], "/dev/zero is no regular file"),
    ],
)
def test_mistakes_are_one_line_and_a_status(image, capsys, arguments, message):
    arguments = [image if a == "IMAGE" else a for a in arguments]
    assert cli.main(["answer", *arguments]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_elsewhere_a_model_must_be_named(image, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["answer", image, "What?"]) == 1
    assert "no model: name one with --model" in capsys.readouterr().err
    (tmp_path / cli.SETTINGS).write_text("[answer]\nmodel = 5\n")
    assert cli.main(["answer", image, "What?"]) == 1
    assert "llava_hivtp.toml names no model under [answer]" in capsys.readouterr().err


def test_the_checkout_names_the_embedded_model():
    settings = tomllib.loads((ROOT / cli.SETTINGS).read_text())
    assert ROOT / settings["answer"]["model"] == EMBEDDED


def test_a_folder_names_its_own_model_and_what_follows_a_question(
    image, capsys, monkeypatch, tmp_path
):
    model = Path(os.path.relpath(ROOT / "eval/nano/checkpoints/nodrop", tmp_path)).as_posix()
    suffix = r'"\nAnswer the question using a single word or phrase."'
    (tmp_path / cli.SETTINGS).write_text(f'[answer]\nmodel = "{model}"\nsuffix = {suffix}\n')
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    assert cli.main(["answer", image, "What color is the square?"]) == 0
    assert "white" in capsys.readouterr().out


def test_a_thin_or_large_image_is_refused_and_the_limits_can_be_set(tmp_path, capsys):
    Image.new("RGB", (1, 6000)).save(tmp_path / "thin.png")
    Image.new("RGB", (80, 60)).save(tmp_path / "small.png")
    thin, small = str(tmp_path / "thin.png"), str(tmp_path / "small.png")
    assert cli.main(["answer", thin, "What?"]) == 1
    assert "thin.png is 1 x 6000 pixels; one side may be 200 times" in capsys.readouterr().err
    assert cli.main(["answer", thin, "What?", "--max-aspect", "2000", "--max-side", "5000"]) == 1
    assert "at most 5000 a side are taken" in capsys.readouterr().err
    assert cli.main(["answer", small, "What?", "--max-side", "79"]) == 1
    assert "small.png is 80 x 60 pixels; at most 79 a side" in capsys.readouterr().err


def test_layers_of_the_embedded_tables_are_those_of_its_depth():
    for row in load_table(ROOT / "configs" / "nano" / "table1.yaml").rows:
        if row.arguments.get("layers"):
            moved = for_depth(build_pruner(row.pruner), 12).layers
            assert moved == tuple(row.arguments["layers"]), row.id
