"""`llava-hivtp answer`: one image, one question, full and pruned."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from eval.nano.draw import draw
from eval.plan.table import load_table
from llava_hivtp import cli

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "scene.webp"
    draw(random.Random(5), "scene").image.save(path, lossless=True)
    return str(path)


def test_full_and_pruned_answers_stand_side_by_side(image, capsys):
    assert cli.main(["answer", image, "What color is the square?"]) == 0
    head, answer, tokens, first = capsys.readouterr().out.splitlines()
    assert head.split() == ["full", "hivtp"]
    assert answer.split() == ["answer", "white", "white"]
    assert tokens.split("  ")[-1].strip().endswith("of 144")
    assert "144 of 144" in tokens
    assert first.count("ms") == 2


def test_arguments_reach_the_pruner(image, capsys):
    arguments = ["--pruner", "random", "--pruner-args", "keep=0.25"]
    assert cli.main(["answer", image, "What color is the square?", *arguments]) == 0
    assert "36 of 144" in capsys.readouterr().out


def test_long_answers_are_wrapped():
    image = SimpleNamespace(patches=1, total=2)
    texts = {"full": "word " * 30, "hivtp": "one"}
    answers = {k: SimpleNamespace(text=v, image=image, ttft=0.1) for k, v in texts.items()}
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
    ],
)
def test_mistakes_are_one_line_and_a_status(image, capsys, arguments, message):
    arguments = [image if a == "IMAGE" else a for a in arguments]
    assert cli.main(["answer", *arguments]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_outside_a_checkout_a_model_must_be_named(image, capsys, monkeypatch):
    monkeypatch.setattr(cli, "EMBEDDED", Path("nowhere"))
    assert cli.main(["answer", image, "What?"]) == 1
    assert "--model" in capsys.readouterr().err


def test_its_layers_are_those_of_the_embedded_tables():
    for row in load_table(ROOT / "configs" / "nano" / "table1.yaml").rows:
        layers = row.arguments.get("layers")
        if layers:
            assert cli.EMBEDDED_LAYERS[row.pruner] == "+".join(map(str, layers))
