"""The script that times transformers' LLaVA: what it counts, and that it goes on after a stop."""

from __future__ import annotations

import csv
import runpy
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "scripts" / "hf_ttft.py"


def test_rounds_are_kept_and_prompts_are_as_long_as_what_stays(tmp_path, monkeypatch):
    file, out = tmp_path / "rounds.jsonl", tmp_path / "ttft"
    for rounds in ("1", "2"):
        named = ["--shape", "tiny", "--rounds", rounds, "--rounds-file", file, "--out", out]
        monkeypatch.setattr("sys.argv", [str(SCRIPT), *map(str, named)])
        before = file.read_text() if file.exists() else ""
        runpy.run_path(str(SCRIPT), run_name="__main__")
        assert file.read_text().startswith(before)
    assert len(file.read_text().splitlines()) == 2
    rows = list(csv.DictReader(out.with_suffix(".csv").open()))
    assert [int(row["length"]) - 64 for row in rows] == [576, 576, 432, 288, 144, 64]
    ideal = [float(row["ideal_ratio"]) for row in rows]
    assert ideal == sorted(ideal, reverse=True)
    assert ideal[0] > ideal[1] == float(rows[1]["ratio"]) == 1
    assert "stock class" in out.with_suffix(".md").read_text()
