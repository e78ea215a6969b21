"""The table of methods: what they keep and cost."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from eval import ROOT
from eval.__main__ import app
from eval.efficiency import methods
from eval.plan.table import load_table, select_rows
from llava_hivtp.pruners import PRUNERS

CONFIG = Path(__file__).parent.parent / "configs" / "table1.yaml"


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tower and a projector of the same depth and grid, but quick."""
    tower, projector = methods.vision_tower, methods.projector
    monkeypatch.setattr(methods, "vision_tower", lambda: tower(width=16, heads=2))
    monkeypatch.setattr(methods, "projector", lambda: projector(16, 32))


@pytest.mark.usefixtures("narrow")
def test_every_method_of_a_table_is_measured() -> None:
    result = CliRunner().invoke(app, ["methods", str(CONFIG), "--repeats", "1"])
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


@pytest.mark.parametrize("tiles", ["2", "one", "", "1,9"])
def test_an_impossible_number_of_tiles_is_refused(tiles: str) -> None:
    result = CliRunner().invoke(app, ["methods", str(CONFIG), "--tiles", tiles])
    assert result.exit_code == 2
    assert "--tiles must be of" in result.output


def test_lines_of_code_leave_out_what_is_no_code(tmp_path: Path) -> None:
    (row,) = select_rows(load_table(CONFIG), "uniform-25")
    source = ROOT / "llava_hivtp/pruners/uniform.py"
    assert 10 < methods._lines(row) < len(source.read_text().splitlines()) - 10
