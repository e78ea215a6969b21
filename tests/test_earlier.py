"""Results of an earlier version (`tests/earlier/`) are read, and their numbers printed as then."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from eval.__main__ import app

ROOT = Path(__file__).resolve().parent.parent
EARLIER = ROOT / "tests" / "earlier"
CELL = re.compile(r"-?\d+(?:\.\d+)?")


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """The table names its checkpoint relative to the checkout."""
    monkeypatch.chdir(ROOT)


def ask(verb, *options):
    files = (str(EARLIER / "table.yaml"), "--out", str(EARLIER / "results"))
    done = CliRunner().invoke(app, [verb, *files, *options])
    assert done.exit_code == 0, done.output
    return done.stdout


def printed(name):
    return (EARLIER / "printed" / name).read_text()


def test_every_number_of_the_csv_is_the_same():
    known, found = (
        {(cell["row"], cell["column"]): cell for cell in csv.DictReader(io.StringIO(text))}
        for text in (printed("table.csv"), ask("table", "--stale", "--format", "csv"))
    )
    assert len(known) == 32
    for key, cell in known.items():
        for name in ("ours", "partial", "paper", "delta", "difference", "p_value", "same_answers"):
            assert found[key][name] == cell[name], (key, name)


@pytest.mark.parametrize(("format", "name"), [("md", "table.md"), ("latex", "table.latex")])
def test_every_number_of_a_line_is_in_it_again(format, name):
    found = ask("table", "--stale", "--format", format).splitlines()
    lines = [line for line in printed(name).splitlines() if re.search("[|&] ours ", line)]
    assert len(lines) == 4
    for line in lines:
        method = re.split(r"[|&]", line)[2 if format == "md" else 1].strip()
        (again,) = (each for each in found if method in each and " ours " in each)
        cells = re.split(r"[|&]", line)
        scores = [CELL.search(c.replace("ours", "")) for c in cells[4 if format == "md" else 3 :]]
        for score in filter(None, scores):
            assert score[0] in CELL.findall(again), (method, score[0])


def test_without_stale_nothing_of_it_counts_and_the_reason_is_said():
    text = ask("table")
    assert "STALE (left out, --stale shows them): the way code is compared changed: 24" in text
    assert "There are no results yet." in text


def test_status_and_dry_run_see_what_was_there():
    text = ask("status")
    assert "16 units, 0 done, 12 stale, 0 running, 0 begun, 1 failed, 0 damaged, 3 missing" in text
    assert printed("status.txt").splitlines()[-1] in text.splitlines()
    plan = ask("run", "--dry-run").splitlines()
    known = [re.sub("done    ", "stale   ", line) for line in printed("plan.txt").splitlines()]
    assert [line[:52] for line in plan[:16]] == [line[:52] for line in known[:16]]
    assert "at the pace of 12 finished units" in plan[16]
