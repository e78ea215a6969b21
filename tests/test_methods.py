"""The table of methods: what they keep and cost."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from eval import ROOT
from eval.__main__ import app
from eval.efficiency import methods
from eval.plan.table import load_table, select_rows
from eval.untrained import shapes
from llava_hivtp.pruners import PRUNERS

CONFIG = Path(__file__).parent.parent / "configs" / "table1.yaml"


def test_every_method_of_a_table_is_measured(monkeypatch) -> None:
    tower = shapes.Encoder(width=16, mlp=64, heads=2)  # of the same depth and grid, but quick
    narrow = replace(shapes.SHAPES["llava-v1.5-7b"], width=32, tower=tower)
    monkeypatch.setitem(shapes.SHAPES, "narrow", narrow)
    command = ["methods", str(CONFIG), "--repeats", "1", "--encoder", "narrow"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    table = [line for line in result.output.splitlines() if line.startswith("|")][2:]
    cells = {row.split("|")[1].strip(): row.split("|")[2:-1] for row in table}
    assert set(cells) == set(PRUNERS)
    assert cells["fopru"][0].split() == ["432", "288", "230", "144"]
    assert cells["fopru"][1].split() == ["2160", "1440", "1150", "720"]
    assert cells["hired"][1].split() == ["2160", "1440", "1152", "720"]
    assert cells["none"][0].split() == ["576"]
    assert all(
        re.fullmatch(r"\d+\.\d\d%", cell.strip()) for row in cells.values() for cell in row[2:4]
    )
    assert "CPU" in result.output
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("tiles", ["2", "one", ",", "1,9"])
def test_an_impossible_number_of_tiles_is_refused(tiles: str) -> None:
    result = CliRunner().invoke(app, ["methods", str(CONFIG), "--tiles", tiles])
    assert result.exit_code == 2
    assert "--tiles" in result.output


def test_lines_of_code_leave_out_what_is_no_code(tmp_path: Path) -> None:
    (row,) = select_rows(load_table(CONFIG), "uniform-25")
    source = ROOT / "llava_hivtp/pruners/uniform.py"
    assert 10 < methods._lines(row) < len(source.read_text().splitlines()) - 10
