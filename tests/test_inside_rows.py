"""Rows of methods inside the language model: run, counted and shown as what they are."""

from __future__ import annotations

import csv
import io

import pytest
from typer.testing import CliRunner

from eval.__main__ import app
from eval.plan.table import load_table
from eval.report.table import render
from eval.results.collect import collect
from eval.results.shelf import Shelf
from llava_hivtp.pruners import read_pruner
from llava_hivtp.pruners.visionzip import VisionZip


def call(verb, *arguments):
    done = CliRunner().invoke(app, [verb, *map(str, arguments)])
    return done.exit_code, " ".join(done.output.split())


def test_a_table_counts_tokens_of_the_mean_layer_and_says_so(table, drawn, tmp_path):
    config, out = table("pope", rows=("full", "hivtp", "inside", "both")), tmp_path / "out"
    options = ("--data", drawn, "--out", out, "--limit", 3, "--timing-n", 1, "--batch", 2)
    assert call("run", config, *options)[0] == 0
    shelf = Shelf(load_table(config), out, limit=3)
    tokens = {unit.row.id: shelf.result(unit).tokens for unit in shelf.units}
    assert [t.patches for t in tokens.values()] == [16, 8, 16, 8]
    assert [t.mean_per_layer for t in tokens.values()] == [None, None, (16 + 4) / 2, (8 + 4) / 2]
    assert {sample.mean_per_layer for sample in shelf.samples(shelf.units[2])} == {10}

    found = collect(shelf.table, shelf.table.rows, out, limit=3)
    shown = render([found], "md")
    assert "| tokens, mean layer | entering |" in " ".join(shown.split())
    assert "Tokens, mean layer: patches that a layer of the language model reads" in shown
    cells = {
        (line["row"], line["column"]): line["ours"]
        for line in csv.DictReader(io.StringIO(render([found], "csv")))
    }
    rows = ("full", "hivtp", "inside", "both")
    assert [cells[row, "tokens"] for row in rows] == ["16", "8", "10", "6"]
    assert [cells[row, "entering"] for row in rows] == ["-", "-", "16", "8"]
    assert cells["inside", "retain"] == "62.5"

    plain = collect(shelf.table, shelf.table.rows[:2], out, limit=3)
    assert "mean layer" not in render([plain], "md")


def test_a_row_above_its_block_in_the_mean_layer_is_refused(table, drawn, tmp_path, monkeypatch):
    config = table("pope", rows=("inside",))
    config.write_text(config.read_text().replace("block: 63", "block: 62"))
    monkeypatch.setattr("eval.run.job.Job._load", lambda self: pytest.fail("weights are read"))
    code, said = call("run", config, "--data", drawn, "--out", tmp_path / "out")
    assert code == 1
    assert "row 'inside': a layer of the language model's 2 reads 10.0 of 16 tokens" in said
    assert "more than its block of 62 % allows: lower keep" in said


def test_layers_that_the_language_model_lacks_are_refused(table, drawn, tmp_path):
    config = table("pope", rows=("inside",))
    config.write_text(config.read_text().replace("after: 1", "after: 2"))
    code, said = call("run", config, "--data", drawn, "--out", tmp_path / "out")
    assert code == 1
    assert "row 'inside': FastV: layers [2] lie outside 1..1" in said


def test_a_method_in_front_is_spelled_within_the_others_arguments():
    both = read_pruner("fastv:after=2,keep=0.5,encoder=visionzip:keep=0.25:layers=23")
    assert (both.after, both.keep) == ((2,), (0.5,))
    assert both.encoder == VisionZip(keep=0.25, layers=(23,))
    assert read_pruner("fastv:encoder=visionzip:keep=0.25").encoder == VisionZip(keep=0.25)


def test_the_arguments_of_lmms_eval_build_them(tiny):
    from lmms_eval.utils import simple_parse_args_string

    from llava_hivtp.lmms import LlavaHIVTP

    spelled = "pruner=pdrop,after=1,keep=0.5,encoder=hivtp:r=2:k=25:c=none:layers=2+3"
    model = LlavaHIVTP(str(tiny()), **simple_parse_args_string(spelled), workers=0).model
    both = read_pruner("pdrop:" + spelled.partition(",")[2])
    assert model.pruner == both
    assert both.encoder.layers == (2, 3)
