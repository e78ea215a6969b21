"""The paper's claims come out of its cells as known, and out of ours as measured."""

from pathlib import Path

import pytest
from stored import store_result, store_timing
from typer.testing import CliRunner

from eval.__main__ import app
from eval.benchmarks.records import BENCHMARKS
from eval.plan.table import load_table
from eval.report.claims import CLAIMS, measured_cells, printed_cells, report

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


@pytest.fixture(scope="module")
def tables():
    return {name: load_table(CONFIGS / f"{name}.yaml") for name in ("table1", "table2", "table3")}


@pytest.fixture(scope="module")
def printed(tables):
    return {name: printed_cells(table) for name, table in tables.items()}


def verdicts(text):
    """By claim: the text, the paper's cells, ours, do the cells give it, do we find it."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return {row[1]: tuple(row[2:]) for row in rows if len(row) == 7}


def nothing(tables, out):
    return {name: measured_cells(table, out) for name, table in tables.items()}


@pytest.mark.parametrize(
    ("claim", "said", "cells", "verdict"),
    [
        ("TTFT at 25 %, v1.5", "-50.0 %", "-50.0 %", "yes"),
        ("TTFT at 25 %, NeXT", "-55.1 %", "-55.1 %", "yes"),
        ("throughput at 25 %, v1.5", "+60.9 %", "+60.9 %", "yes"),
        ("throughput at 25 %, NeXT", "+47.3 %", "+47.1 %", "no"),
        ("largest drop of TTFT against prior work, v1.5", "-26.5 %", "-26.5 %", "yes"),
        ("the same without VisionZip at 40 %, slower there than at 50 %", "-", "-16.7 %", "-"),
        ("mean change, v1.5, all ratios and benchmarks", "-2.8 %", "-1.6 %", "no"),
        ("mean change on the other six benchmarks, NeXT", "-0.8 %", "-1.0 %", "no"),
        ("no method has a higher throughput, NeXT", "-", "not throughput 25 %", "no"),
        (
            "no method scores higher, v1.5",
            "-",
            "not ScienceQA 75 %, MMBench 50 %, TextVQA 40 %, MME 25 %, OCRBench 25 %",
            "no",
        ),
        (
            "no method scores higher, NeXT",
            "-",
            "not OCRBench 75 %, OCRBench 50 %, OCRBench 40 %, OCRBench 25 %",
            "no",
        ),
        ("r_retain is tokens over unpruned tokens", "-", "not table2 75 %", "no"),
        ("layers 7-10 score best of four choices", "-", "without exception", "yes"),
    ],
)
def test_the_paper_s_cells_give_what_they_give(
    tables, printed, tmp_path, claim, said, cells, verdict
):
    found = verdicts(report(printed, nothing(tables, tmp_path)))
    assert found[claim] == (said, cells, "-", verdict, "-")


def test_a_claim_about_times_is_found_within_its_tolerance(tables, printed, tmp_path):
    table = tables["table1"]
    rows = {row.id: row for row in table.rows}
    for task in table.tasks:
        store_timing(tmp_path, table, rows["full"], task, 100, 20, device="NVIDIA H100")
        store_timing(tmp_path, table, rows["hivtp-25"], task, 54, 30, device="NVIDIA H100")
    found = verdicts(report(printed, nothing(tables, tmp_path)))
    assert found["TTFT at 25 %, v1.5"][2:] == ("-46.0 %", "yes", "yes")
    assert found["throughput at 25 %, v1.5"][2:] == ("+50.0 %", "yes", "no")
    assert found["TTFT at 25 %, NeXT"][2:] == ("-", "yes", "-")
    assert found["no method has a lower TTFT, v1.5"][2] == "-"


def test_a_mean_over_some_tasks_supports_no_claim(tables, printed, tmp_path):
    table = tables["table1"]
    rows = {row.id: row for row in table.rows}
    store_timing(tmp_path, table, rows["full"], "mme", 100, 20)
    store_timing(tmp_path, table, rows["hivtp-25"], "mme", 50, 30)
    found = verdicts(report(printed, nothing(tables, tmp_path)))
    assert found["TTFT at 25 %, v1.5"][2] == "-"


def test_ours_reads_like_the_paper_when_the_numbers_are_the_paper_s(tables, printed, tmp_path):
    for table in tables.values():
        columns = {BENCHMARKS[task].column: task for task in table.tasks}
        for row in (row for row in table.rows if row.printed):
            for column, task in columns.items():
                if column in row.printed:
                    score = float(row.printed[column])
                    kept = float(row.printed.get("retain", 50)) * 5.76
                    store_result(tmp_path, table, row, task, [1.0], score=score, patches=kept)
                if "ttft_ms" in row.printed:
                    times = float(row.printed["ttft_ms"]), float(row.printed["throughput"])
                    store_timing(tmp_path, table, row, task, *times)
    ours = nothing(tables, tmp_path)
    for claim in CLAIMS:
        if "r_retain" not in claim.text:  # ours is consistent by construction
            assert claim.compute(ours) == pytest.approx(claim.compute(printed)), claim.text


def test_the_command_runs_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["claims"])
    assert result.exit_code == 0
    assert len(verdicts(result.stdout)) == len(CLAIMS) + 2  # heading and rule
