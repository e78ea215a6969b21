"""Rows of tuned checkpoints: run on their own, marked, and compared with nothing by accident."""

from __future__ import annotations

import json
import shutil

import pytest
from typer.testing import CliRunner

from eval.__main__ import app
from eval.plan.reader import ConfigError
from eval.plan.table import load_table, select_rows
from eval.results.collect import collect
from eval.results.shelf import Shelf

HIVTP = {"r": 2, "k": 25, "c": 2, "layers": [2, 3], "fill": False}
TUNED = (
    "\n  - {id: hivtp-tuned, pruner: hivtp, r: 2, k: 25, c: 2, layers: [2, 3], block: 50, "
    "set: tuned, name: 'HIVTP, projector', checkpoint: '%s'}\n"
)


def call(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture
def tuned(table, tiny, tmp_path):
    """A table with a tuned row behind the others, and its checkpoint with other weights."""
    from safetensors.torch import load_file, save_file

    own = tmp_path / f"{tiny().name}-hivtp-projector-merged"
    shutil.copytree(tiny(), own)
    settings = json.loads((own / "config.json").read_text())
    settings["trained_with"] = {"pruner": "hivtp", "arguments": [HIVTP]}
    (own / "config.json").write_text(json.dumps(settings))
    weights = load_file(own / "model.safetensors")
    save_file(
        {name: -w for name, w in weights.items()}, own / "model.safetensors", {"format": "pt"}
    )
    path = table("pope")
    path.write_text(path.read_text() + TUNED % (tmp_path / "{model}-hivtp-projector-merged"))
    return path, own


def test_a_tuned_row_runs_on_its_own_checkpoint_and_is_marked(tuned, drawn, tmp_path):
    path, own = tuned
    out = tmp_path / "out"
    done = call(
        "run", path, "--rows", "full,hivtp,tuned", "--data", drawn, "--out", out,
        "--limit", 2, "--no-timing",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    table = load_table(path)
    rows = select_rows(table, "full,hivtp,tuned")
    shelf = Shelf(table, out, rows, limit=2)
    results = {row.id: shelf.result(shelf.unit(row, "pope")) for row in rows}
    names = {row: result.protocol["checkpoint"] for row, result in results.items()}
    assert names == {"full": table.models[0].split("/")[-1], "hivtp": names["full"]} | {
        "hivtp-tuned": own.name
    }
    digests = {result.protocol["checkpoint digest"] for result in results.values()}
    assert len(digests) == 2
    # Equal settings, another checkpoint: two units, two sections, one mark.
    found = collect(table, rows, out, limit=2)
    assert {m.row.id: m.row.section for m in found.rows} == {
        "full": "100 %", "hivtp": "50 %", "hivtp-tuned": "50 %, tuned",
    }  # fmt: skip
    assert found.protocol["checkpoint"] == names["full"]
    said = call("table", path, "--rows", "full,hivtp,tuned", "--out", out, "--limit", 2)
    assert "HIVTP, projector (tuned)" in said.output
    assert "TUNED, not training-free: hivtp-tuned" in said.output
    csv = call("table", path, "--rows", "tuned", "--out", out, "--limit", 2, "--format", "csv")
    assert str(own) in csv.output


def test_a_tuned_row_is_shown_when_asked_for_only(tuned):
    table = load_table(tuned[0])
    assert [row.id for row in select_rows(table)] == ["full", "hivtp"]
    assert [row.id for row in select_rows(table, "tuned")] == ["hivtp-tuned"]


def test_a_checkpoint_tuned_under_another_method_is_refused(tuned, drawn, tmp_path):
    path, own = tuned
    settings = json.loads((own / "config.json").read_text())
    settings["trained_with"]["arguments"][0]["k"] = 50
    for change in (settings, {k: v for k, v in settings.items() if k != "trained_with"}):
        (own / "config.json").write_text(json.dumps(change))
        done = call(
            "run", path, "--rows", "tuned", "--data", drawn, "--out", tmp_path / "out", "--limit", 2
        )
        assert done.exit_code == 1
        assert "was not tuned under this method" in done.output
    assert not (tmp_path / "out").is_dir()


@pytest.mark.parametrize("broken", [", checkpoint: 'x'", ", set: tuned"])
def test_the_set_and_the_checkpoint_go_together(table, broken):
    path = table("pope")
    path.write_text(path.read_text().replace("k: 25, c: 2", f"k: 25, c: 2{broken}"))
    with pytest.raises(ConfigError, match="set 'tuned' goes with a 'checkpoint'"):
        load_table(path)
