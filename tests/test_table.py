"""A table shows what is stored, marks what is missing and refuses to mix."""

import csv
import io
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from scipy.stats import binomtest
from stored import store_result, store_timing
from typer.testing import CliRunner

from eval.__main__ import app
from eval.plan.table import load_table, select_rows
from eval.plan.units import unit_path
from eval.report.table import render
from eval.results import records, store
from eval.results.agree import MixedResults
from eval.results.collect import collect
from eval.results.records import Failure, Sample
from eval.results.shelf import Shelf
from eval.results.sources import Code
from eval.run.estimate import plan

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
SMALL = """\
title: Small
models: [lab/tiny-7b, lab/tiny-next]
layout: unpad
patches: 576
device: NVIDIA A40
tasks: [pope, gqa]
protocol: {pope: accuracy, gqa: testdev balanced}
rows:
  - {id: full, pruner: none, block: 100, printed: {tokens: 576, pope: 90.00, gqa: 60.0, ttft_ms: 140}}
  - {id: fopru, pruner: fopru, keep: 0.5, block: 50, printed: {pope: 80.50, gqa: 50.00, ttft_ms: 100}}
  - {id: hivtp, pruner: hivtp, r: 2, k: 25, c: 2, block: 50,
     printed: {tokens: 282, pope: 85.10, gqa: 50.00, ttft_ms: 92}}
  - {id: random, pruner: random, keep: 0.5, block: 50, set: control}
"""  # noqa: E501


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return load_table(path)


def right(share, of=200):
    return [1.0] * round(share * of) + [0.0] * (of - round(share * of))


def fill(table, out, **scores):
    """Store pope and gqa of the rows named, given their shares of right answers."""
    rows = {row.id: row for row in table.rows}
    for name, shares in scores.items():
        for task, share in zip(("pope", "gqa"), shares, strict=True):
            patches = 576 if name == "full" else 288
            store_result(out, table, rows[name], task, right(share), patches=patches)


def show(table, out, rows=None, format="md", full=False, width=0, **options):
    found = collect(table, select_rows(table, rows), out, **options)
    return render([found], format, full, width)


def lines_of(text, method):
    """Cells of a method in a Markdown table, by source."""
    found, name = {}, None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) > 3:
            name = cells[1] or name
            if name == method:
                found[cells[2]] = cells[3:]
    return found


HIDDEN = """\
title: Hidden answers
models: [lab/tiny-7b]
layout: unpad
patches: 576
tasks: [gqa, vizwiz_vqa_val]
protocol: {gqa: testdev balanced, vizwiz: validation}
rows:
  - {id: full, pruner: none, block: 100, printed: {gqa: 60.0, vizwiz: 50.0}}
"""


def test_a_number_printed_for_a_test_split_is_not_compared_with_validation(tmp_path):
    (tmp_path / "t.yaml").write_text(HIDDEN)
    table = load_table(tmp_path / "t.yaml")
    for task in table.tasks:
        store_result(tmp_path, table, table.rows[0], task, right(0.625))
    cells = lines_of(show(table, tmp_path), "nothing pruned")
    assert cells["paper"][2:4] == ["60.0", "50.0 (test)"]
    assert cells["Δ"][2:4] == ["+2.50", "-"]
    note = "VizWiz: the paper's numbers are of test, whose answers are hidden, ours of validation"
    assert note in show(table, tmp_path)
    assert note not in show(load_table(CONFIGS / "table1.yaml"), tmp_path)


def test_with_nothing_run_the_paper_is_printed_and_ours_is_missing(tmp_path):
    table = load_table(CONFIGS / "table1.yaml")
    text = show(table, tmp_path)
    hivtp = lines_of(text, "HIVTP (r=2, k=50, c=2)")
    assert set(hivtp["ours"]) == {"-"}
    assert hivtp["paper"][:2] == ["70.1", "404"]
    assert hivtp["paper"][2:6] == ["**1512.41**", "**87.20**", "**45.44**", "**65.03**"]
    assert hivtp["paper"][6:9] == ["69.89", "**31.40**", "**61.42**"]
    assert hivtp["paper"][9:] == ["**54.98**", "**114**", "**22.95**"]
    assert "Δ" not in hivtp
    assert set(lines_of(text, "random (control)")) == {"ours"}
    printed = [row for row in table.rows if row.printed]
    assert text.count("| paper |") == len(printed)
    for row in printed:
        for number in row.printed.values():
            assert re.search(rf"[ *]{re.escape(str(number))}[ *]", text), (row.id, number)


def test_ours_stands_beside_the_paper_s_with_the_difference(small, tmp_path):
    fill(small, tmp_path, full=(0.9, 0.6), hivtp=(0.86, 0.5))
    found = lines_of(show(small, tmp_path), "HIVTP (r=2, k=25, c=2)")
    # r_retain, tokens, POPE, GQA, mean, % of unpruned, TTFT
    assert found["ours"][:2] == ["50.0", "288"]
    assert found["ours"][2].startswith("86.00 [80.4")
    assert found["ours"][4].startswith("68.00 [")
    assert found["ours"][5].startswith("89.4 [")  # of 86 / 90 and 50 / 60
    assert found["paper"][2:4] == ["**85.10**", "**50.00**"]
    assert found["Δ"] == ["-", "+6", "+0.90", "+0.00", "-", "-", "-"]


def test_the_best_of_a_block_is_bold_if_it_beats_every_other_one_not_by_chance(small, tmp_path):
    fill(small, tmp_path, full=(0.9, 0.9), hivtp=(0.86, 0.5), random=(0.85, 0.4), fopru=(0.7, 0.3))
    text = show(small, tmp_path)

    def bold(method, source):
        return [cell.startswith("**") for cell in lines_of(text, method)[source][2:4]]

    assert bold("HIVTP (r=2, k=25, c=2)", "ours") == [False, True]  # 2 of 200 are chance
    assert bold("random (control)", "ours") == [False, False]
    assert bold("FoPru", "ours") == [False, False]
    assert bold("nothing pruned", "ours") == [False, False]
    assert lines_of(text, "HIVTP (r=2, k=25, c=2)")["ours"][4].startswith("**68.00**")
    assert bold("FoPru", "paper") == [False, True]  # 50.00 twice
    assert bold("HIVTP (r=2, k=25, c=2)", "paper") == [True, True]


def test_a_time_without_an_interval_is_not_called_the_best(small, tmp_path):
    rows = {row.id: row for row in small.rows}
    for name, time in {"full": 10, "fopru": 30, "hivtp": 20}.items():
        for task in small.tasks:
            store_timing(tmp_path, small, rows[name], task, ttft_ms=time, throughput=1000 / time)
    text = show(small, tmp_path)
    assert lines_of(text, "HIVTP (r=2, k=25, c=2)")["ours"][-2:] == ["20.0", "50.00"]
    assert lines_of(text, "FoPru")["ours"][-2:] == ["30.0", "33.33"]
    assert lines_of(text, "HIVTP (r=2, k=25, c=2)")["Δ"][-2] == "-72.0"


def test_counts_are_means_over_requests_then_over_tasks(small, tmp_path):
    hivtp = small.rows[2]
    store_result(tmp_path, small, hivtp, "pope", right(0.5, 10), patches=270, newlines=12)
    store_result(tmp_path, small, hivtp, "gqa", right(0.5, 1000), patches=290, newlines=14)
    found = lines_of(show(small, tmp_path), "HIVTP (r=2, k=25, c=2)")["ours"]
    assert found[:3] == ["48.6", "280", "13"]


def test_a_mean_over_some_tasks_says_so_and_is_not_compared(small, tmp_path):
    store_result(tmp_path, small, small.rows[2], "pope", right(0.86))
    found = lines_of(show(small, tmp_path), "HIVTP (r=2, k=25, c=2)")
    assert found["ours"][:2] == ["50.0 (1/2)", "288 (1/2)"]
    assert found["Δ"] == ["-", "-", "+0.90", "-", "-"]


def test_rows_of_different_protocols_are_refused_with_the_difference(small, tmp_path):
    fill(small, tmp_path, full=(0.9, 0.6))
    store_result(tmp_path, small, small.rows[2], "pope", right(0.8), protocol={"dtype": "float32"})
    with pytest.raises(MixedResults) as error:
        show(small, tmp_path)
    assert "dtype: float16 (full); float32 (hivtp)" in str(error.value)
    assert "lmms_eval" not in str(error.value)
    show(small, tmp_path, rows="full,fopru")  # without the odd row it stands


def test_what_only_one_row_records_is_a_difference(small, tmp_path):
    fill(small, tmp_path, full=(0.9, 0.6))
    store_result(tmp_path, small, small.rows[2], "pope", right(0.8), protocol={"backend": "pil"})
    with pytest.raises(MixedResults, match=r"backend: not recorded \(full\); pil \(hivtp\)"):
        show(small, tmp_path)


def test_task_versions_may_differ_between_tasks_but_not_between_rows(small, tmp_path):
    full, fopru, *_ = small.rows
    store_result(tmp_path, small, full, "pope", right(0.8), protocol={"task": {"version": 1}})
    store_result(tmp_path, small, full, "gqa", right(0.8), protocol={"task": {"version": 2}})
    store_result(tmp_path, small, fopru, "gqa", right(0.8), protocol={"task": {"version": 2}})
    text = show(small, tmp_path, full=True)
    assert "gqa version 2; lmms_eval 0.7.3; pope version 1" in text
    store_result(tmp_path, small, fopru, "pope", right(0.8), protocol={"task": {"version": 2}})
    with pytest.raises(MixedResults, match=r"pope version: 1 \(full\); 2 \(fopru\)"):
        show(small, tmp_path)


def test_timings_have_a_protocol_of_their_own(small, tmp_path):
    full, fopru, *_ = small.rows
    for row in (full, fopru):
        store_result(tmp_path, small, row, "pope", right(0.8), protocol={"batch": 16})
        store_timing(tmp_path, small, row, "pope", 100, 20)
    assert "timing batch 1" in show(small, tmp_path, full=True)
    store_timing(tmp_path, small, fopru, "pope", 100, 20, protocol={"batch": 4})
    with pytest.raises(MixedResults, match="timing results .*(\n.*)*batch: 1"):
        show(small, tmp_path)


def test_a_difference_of_provenance_is_listed_not_refused(small, tmp_path):
    fill(small, tmp_path, full=(0.9, 0.6))
    provenance = {"commit": "def5678", "device": "NVIDIA H100", "versions": {"torch": "2.14.0"}}
    store_result(tmp_path, small, small.rows[2], "pope", right(0.8), provenance=provenance)
    text = show(small, tmp_path, full=True)
    assert "commit abc1234, def5678" in text
    assert "device NVIDIA A40, NVIDIA H100" in text
    assert "torch version 2.13.0, 2.14.0" in text


def test_times_of_two_devices_never_share_a_table(small, tmp_path):
    _, fopru, hivtp, _ = small.rows
    for task in small.tasks:
        store_timing(tmp_path, small, fopru, task, 50, 40, device="NVIDIA H100")
        store_timing(tmp_path, small, hivtp, task, 92, 20, device="NVIDIA A40")
    text = show(small, tmp_path)
    assert lines_of(text, "FoPru")["ours"][-1] == "-"
    assert lines_of(text, "HIVTP (r=2, k=25, c=2)")["ours"][-1] == "-"
    assert "Times were taken on NVIDIA A40; NVIDIA H100: choose with --device." in text
    chosen = show(small, tmp_path, device="A40")
    assert lines_of(chosen, "HIVTP (r=2, k=25, c=2)")["ours"][-2:] == ["92.0", "20.00"]
    assert lines_of(chosen, "FoPru")["ours"][-2:] == ["-", "-"]
    # another device than the paper's: times, but no difference to the paper's
    other = show(small, tmp_path, device="H100")
    assert lines_of(other, "FoPru")["ours"][-2:] == ["50.0", "40.00"]
    assert "Δ" not in lines_of(other, "FoPru")
    assert "so no difference is given" in other


def test_a_dry_run_is_shown_apart_and_never_fills_a_table(small, tmp_path):
    for task in small.tasks:
        store_result(tmp_path, small, small.rows[2], task, right(0.5, 8), limit=8)
    assert set(lines_of(show(small, tmp_path), "HIVTP (r=2, k=25, c=2)")["ours"]) == {"-"}
    dry = show(small, tmp_path, limit=8)
    assert dry.startswith("## DRY RUN over 8 documents per task, no result:")
    found = lines_of(dry, "HIVTP (r=2, k=25, c=2)")
    assert found["ours"][2].startswith("50.00")
    assert set(found) == {"ours"}
    assert "**" not in dry


def test_the_paper_s_numbers_are_not_compared_with_another_model(small, tmp_path):
    other = load_table(small.path, "elsewhere/tiny-random")
    fill(other, tmp_path, hivtp=(0.86, 0.5))
    text = show(other, tmp_path)
    assert set(lines_of(text, "HIVTP (r=2, k=25, c=2)")) == {"ours", "paper"}
    assert "about lab/tiny-7b, so no difference is given" in text


@pytest.mark.parametrize("damage", ["empty", "cut", "score null"])
def test_a_result_cut_short_or_without_a_score_is_missing(small, tmp_path, damage):
    fill(small, tmp_path, hivtp=(0.86, 0.5))
    path = unit_path(tmp_path, small.model, small.rows[2], "pope")
    whole = path.read_text()
    damaged = {
        "empty": "",
        "cut": whole[: len(whole) // 2],
        "score null": whole.replace('"score": 86.0', '"score": null'),
    }[damage]
    assert damaged != whole
    path.write_text(damaged)
    found = lines_of(show(small, tmp_path), "HIVTP (r=2, k=25, c=2)")["ours"]
    assert found[2] == "-"
    assert found[3].startswith("**50.00**") or found[3].startswith("50.00")


def test_samples_that_contradict_the_score_give_no_interval(small, tmp_path):
    hivtp = small.rows[2]
    store_result(tmp_path, small, hivtp, "pope", right(0.86), score=85.0)
    text = show(small, tmp_path)
    assert lines_of(text, "HIVTP (r=2, k=25, c=2)")["ours"][2] == "85.00"
    assert "hivtp, pope: the samples add up to 86.00, the score is 85.00" in text


def test_rows_are_tested_against_the_unpruned_row(small, tmp_path):
    full, _, hivtp, _ = small.rows
    before = right(0.9)
    after = [0.0] * 20 + before[20:]
    answers = ["no"] * 20 + ["yes" if r else "no" for r in before[20:]]
    answers[-1] = "maybe"  # as wrong as before, and another answer
    store_result(tmp_path, small, full, "pope", before)
    store_result(tmp_path, small, hivtp, "pope", after, answers=answers)
    tests = show(small, tmp_path, rows="hivtp").split("\n\n")[3]  # the reference is not shown
    assert re.search(r"\| \*\*-10.00\*\* \(p < 0.001\), 89.5 % +\| +- \|", tests)


def table_of(path, out, *options):
    done = CliRunner().invoke(app, ["table", str(path), "--out", str(out), *options])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_every_row_can_be_paired_with_any(small, tmp_path):
    """Against HIVTP: the unpruned row, too; the mean, and Holm over all nine cells."""
    fill(small, tmp_path, full=(0.9, 0.6), hivtp=(0.86, 0.5), random=(0.7, 0.45), fopru=(0.86, 0.5))
    text = table_of(small.path, tmp_path, "--against", "hivtp")
    pairs, said = text.split("\n\n")[3:5]
    assert "HIVTP" not in pairs
    # eight won, none lost: 2 / 2 ** 8, the sixth smallest of nine, so times four
    assert re.search(r"nothing pruned .* \*\*\+4.00\*\* \(p 0.031\), 96.0 %", pairs)
    assert re.search(r"random .*\*\*-16.00\*\* \(p < 0.001\), 84.0 %", pairs)
    assert re.search(r"FoPru .* \+0.00 \(p 1.000\), 100.0 % .* \+0.00 \(p 1.000\)", pairs)
    assert pairs.splitlines()[0].split("|")[-2].strip() == "mean"
    assert said.startswith("Difference in points to HIVTP (r=2, k=25, c=2) on the same documents")
    assert "corrected by Holm over the 9 cells" in said
    wrong = CliRunner().invoke(app, ["table", str(small.path), "--against", "hivpt"])
    assert "no row 'hivpt'; choose from full, fopru" in wrong.output
    several = CliRunner().invoke(app, ["table", str(small.path), "--against", "paper"])
    assert "one row is needed, not 'paper'" in several.output


def test_a_wide_table_is_folded_to_the_width_asked_for(small, tmp_path):
    fill(small, tmp_path, full=(0.9, 0.6), hivtp=(0.86, 0.5))
    wide, folded = (table_of(small.path, tmp_path, "--width", width) for width in ("0", "80"))
    rows = [line for line in folded.splitlines() if line.startswith("|")]
    assert max(map(len, rows)) <= 80
    assert max(len(line) for line in wide.splitlines() if line.startswith("|")) > 120
    for number in re.findall(r"\d+\.\d+", wide):
        assert number in folded


def test_the_protocol_is_short_unless_asked_for(small, tmp_path):
    fill(small, tmp_path, full=(0.9, 0.6))
    short, full = table_of(small.path, tmp_path), table_of(small.path, tmp_path, "--protocol")
    assert "- Protocol: dtype float16; 3 more with --protocol." in short
    assert "- Provenance: commit abc1234; device NVIDIA A40; date 2026-11-20." in short
    assert "gqa version 1; lmms_eval 0.7.3; pope version 1" in full
    assert "torch version 2.13.0" in full


def test_patches_of_another_grid_make_no_table(table, tmp_path):
    config = table("pope", rows=("full",))
    config.write_text(config.read_text().replace("patches: 16", "patches: 576"))
    done = CliRunner().invoke(app, ["table", str(config), "--out", str(tmp_path)])
    assert done.exit_code == 1
    assert "patches is 576, but a tile of" in done.output


def test_a_method_of_ones_own_has_a_name_and_a_set(tmp_path):
    path = tmp_path / "small.yaml"
    (tmp_path / "mine.py").write_text(MINE.replace("from mine_score import score\n", ""))
    rows = OWN.replace("mine:Mine", f"{tmp_path / 'mine.py'}:Mine")
    named = rows.replace("id: mine", "id: named, name: 'Mine, second try'")
    path.write_text(SMALL + rows + named)
    text = table_of(path, tmp_path)
    assert "| Mine (own) " in text
    assert "| Mine, second try (own) " in text
    assert [row.id for row in select_rows(load_table(path), "own")] == ["mine", "named"]


def test_a_method_whose_counts_are_calibrated_stands_apart(tmp_path):
    path = tmp_path / "small.yaml"
    (tmp_path / "mine.py").write_text(CALIBRATED)
    path.write_text(SMALL + OWN.replace("mine:Mine", f"{tmp_path / 'mine.py'}:Mine"))
    assert load_table(path).rows[-1].section == "50 %, calibrated"


def test_csv_has_every_cell_with_what_is_known_about_it(small, tmp_path):
    fill(small, tmp_path, full=(0.9, 0.6), hivtp=(0.86, 0.5))
    cells = {
        (cell["row"], cell["column"]): cell
        for cell in csv.DictReader(io.StringIO(show(small, tmp_path, format="csv")))
    }
    assert len(cells) == 4 * 7
    cell = cells["hivtp", "pope"]
    assert (cell["ours"], cell["paper"], cell["delta"]) == ("86.00", "85.10", "+0.90")
    assert float(cell["difference"]) == pytest.approx(-4)
    # eight documents were lost, none won
    assert float(cell["p_value"]) == pytest.approx(2 * 0.5**8)
    # of two tests, the larger p stays as it is or follows the smaller one
    assert float(cell["corrected"]) >= float(cell["p_value"])
    assert cell["against"] == "full"
    known = binomtest(172, 200).proportion_ci(method="wilson")
    assert float(cell["low"]) == pytest.approx(100 * known.low, abs=0.1)
    assert float(cell["high"]) == pytest.approx(100 * known.high, abs=0.1)
    assert cells["random", "pope"]["ours"] == cells["random", "pope"]["paper"] == "-"


def test_latex_escapes_and_balances(small, tmp_path):
    fill(small, tmp_path, full=(0.9, 0.6), hivtp=(0.86, 0.5))
    text = show(small, tmp_path, format="latex")
    body = [line for line in text.splitlines() if not line.startswith("%")]
    begun = [line for line in body if line.startswith(r"\begin{tabular}")]
    assert len(begun) == body.count(r"\end{tabular}") == 2
    for line in body:
        if line.endswith(r"\\"):
            assert line.count(" & ") in (5, 9)  # names, then two benchmarks and their mean or all
        assert not re.search(r"(?<!\\)[%_]|[±Δ]", line)
    assert r"\textbf{86.00}" not in text  # alone in its block, it beats nobody
    assert r"\textbf{85.10}" in text


def test_the_second_checkpoint_is_shown_once_it_has_results(small, tmp_path):
    def run():
        return CliRunner().invoke(app, ["table", str(small.path), "--out", str(tmp_path)])

    assert "tiny-next" not in run().stdout
    fill(load_table(small.path, "lab/tiny-next"), tmp_path, full=(0.9, 0.6))
    text = run().stdout
    assert "## Small (lab/tiny-7b)" in text
    assert "## Small (lab/tiny-next)" in text


def test_a_bad_table_ends_with_one_line_and_a_status(small, tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text(SMALL.replace("keep: 0.5", "keep: 0.6"))
    for command in ("table", "status"):
        result = CliRunner().invoke(app, [command, str(bad), "--out", str(tmp_path)])
        assert result.exit_code == 1
        assert f"{bad}:10: row 'fopru' may keep 345" in result.output


def test_few_questions_of_ocrbench_count_in_percent_and_are_labelled(tmp_path):
    """lmms-eval divides its points by 1000, however few were asked."""
    path = tmp_path / "ocr.yaml"
    path.write_text(
        SMALL.replace("[pope, gqa]", "[ocrbench]")
        .replace("{pope: accuracy, gqa: testdev balanced}", "{ocr: points of 1000}")
        .replace("pope:", "ocr:").replace("gqa: 60.0, ", "").replace("gqa: 50.00, ", "")
        .replace(", gqa: 50.00", "")
    )  # fmt: skip
    table = load_table(path)
    rows = {row.id: row for row in table.rows}
    store_result(tmp_path, table, rows["full"], "ocrbench", right(0.75, 40), score=3.0)
    store_result(tmp_path, table, rows["hivtp"], "ocrbench", right(0.312, 1000))
    text = show(table, tmp_path)
    assert lines_of(text, "nothing pruned")["ours"][2].startswith("75.00 [")
    (hivtp,) = (
        c
        for c in lines_of(text, "HIVTP (r=2, k=25, c=2)")["ours"]
        if "31.20 [" in c and "4" in c[:10] + "4"
    )
    assert "OCRBench asked 40 questions here: percent of these, not points of 1000." in text
    assert "OCRBench asked 1000" not in text


def test_an_mme_of_fewer_categories_is_labelled(tmp_path):
    path = tmp_path / "mme.yaml"
    path.write_text(
        "title: M\nmodels: [m]\nlayout: unpad\npatches: 16\ntasks: [mme]\n"
        "protocol: {mme: perception}\nrows:\n  - {id: full, pruner: none, block: 100}\n"
    )
    table = load_table(path)
    for categories, said in ((5, True), (10, False)):
        rights = [1.0] * 4 * categories
        found = store_result(tmp_path, table, table.rows[0], "mme", rights, score=200 * categories)
        samples = [
            Sample(i, "yes", 1.0, str(i // 2), stratum=f"category {i // 4}")
            for i in range(len(rights))
        ]
        result = records.read_result(found)
        digest = records.write_samples(found, samples)
        records.write_result(found, replace(result, samples=digest))
        text = show(table, tmp_path)
        assert f"{200 * categories}.00" in text
        assert ("MME has 5 categories here, so at most 1000 points, not 2000" in text) == said


def other_code(of):
    """`Code.of` as it would be after an edit of one module."""
    known = Code.of

    def changed(self, row, model):
        return {**known(self, row, model), of: "0" * 16}

    return changed


@pytest.mark.parametrize("changed", ["the checkpoint", "llava_hivtp.model"])
def test_a_stale_result_is_neither_done_nor_in_the_table(small, tmp_path, monkeypatch, changed):
    """A number that no longer belongs to the checkpoint or the code must be asked for."""
    fill(small, tmp_path, full=(0.9, 0.6), hivtp=(0.86, 0.5))
    rows = {row.id: row for row in small.rows}
    store_timing(tmp_path, small, rows["hivtp"], "pope", 100, 20)
    fresh = show(small, tmp_path, "hivtp")
    assert "STALE" not in fresh

    if changed == "the checkpoint":
        monkeypatch.setattr("eval.results.shelf.checkpoint_digest", lambda _: "0" * 16)
    else:
        monkeypatch.setattr(Code, "of", other_code(changed))
    text = show(small, tmp_path, "hivtp")
    assert set(lines_of(text, "HIVTP (r=2, k=25, c=2)")["ours"]) == {"-"}
    assert f"STALE (left out, --stale shows them): {changed} changed: 5 results" in text
    assert "Provenance" not in text
    asked = show(small, tmp_path, "hivtp", stale=True)
    assert lines_of(asked, "HIVTP (r=2, k=25, c=2)") == lines_of(fresh, "HIVTP (r=2, k=25, c=2)")
    assert f"STALE (shown all the same): {changed} changed: 5 results" in asked

    status = CliRunner().invoke(
        app, ["status", str(small.path), "--out", str(tmp_path), "--rows", "hivtp"]
    )
    assert "2 units, 0 done, 2 stale, 0 running" in status.stdout
    assert f"{changed} changed: 2 units" in status.stdout
    todo = plan(Shelf(small, tmp_path, [rows["hivtp"]]), timing_n=10)
    assert [line.split()[3] for line in todo.splitlines()[:2]] == ["stale", "stale"]
    with store.locked(unit_path(tmp_path, small.model, rows["hivtp"], "pope")):
        status = CliRunner().invoke(app, ["status", str(small.path), "--out", str(tmp_path)])
    assert "1 running" in status.stdout


def test_the_unpruned_row_is_no_baseline_once_it_is_stale(small, tmp_path, monkeypatch):
    fill(small, tmp_path, full=(0.9, 0.6), hivtp=(0.86, 0.5))
    (before,) = collect(small, select_rows(small, "hivtp"), tmp_path).rows
    assert set(before.paired) == {"pope", "gqa", "mean"}
    known, changed = Code.of, other_code("llava_hivtp.pruners.base")
    monkeypatch.setattr(
        Code,
        "of",
        lambda self, row, model: (changed if row.id == "full" else known)(self, row, model),
    )
    (after,) = collect(small, select_rows(small, "hivtp"), tmp_path).rows
    assert before.values.pop("relative") < 100
    assert after.values == before.values
    assert not after.paired


OWN = "  - {id: mine, pruner: 'mine:Mine', keep: 0.5, block: 50}\n"
MINE = """from dataclasses import dataclass
from mine_score import score
from llava_hivtp.pruners.base import ScorePruner


@dataclass
class Mine(ScorePruner):
    def score(self, features):
        return score(features)
"""


CALIBRATED = """\
from dataclasses import dataclass
from typing import ClassVar
from llava_hivtp.pruners.base import Pruner


@dataclass
class Mine(Pruner):
    keep: float = 1.0
    calibrated: ClassVar[bool] = True
"""


def eval_in(folder, *arguments):
    """`python -m eval ...` with the library, the evaluation and own methods of a folder."""
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-m", "eval", *map(str, arguments)]
    done = subprocess.run(call, env=environment, cwd=folder, capture_output=True, text=True)
    return done.stdout + done.stderr


def test_words_void_nothing_code_does_and_the_reason_is_named(tmp_path):
    """A checkout of its own, edited: the library, a method, an own method and what it imports."""
    checkout, out = tmp_path / "checkout", tmp_path / "out"
    for name in ("eval", "llava_hivtp"):
        shutil.copytree(
            ROOT / name, checkout / name, ignore=shutil.ignore_patterns("nano", "__pycache__")
        )
    (checkout / "mine.py").write_text(MINE)
    (checkout / "mine_score.py").write_text("def score(features):\n    return features.cls\n")
    config = checkout / "small.yaml"
    config.write_text(SMALL + OWN)
    code = (
        "import sys; sys.path.insert(1, sys.argv[1])\n"
        "from stored import store_result; from eval.plan.table import load_table\n"
        "table = load_table(sys.argv[2])\n"
        "for row in table.rows:\n"
        "    for task in table.tasks: store_result(sys.argv[3], table, row, task, [1.0, 0.0])\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, ROOT / "tests", config, out],
        env=os.environ | {"PYTHONPATH": str(checkout)}, cwd=checkout, check=True,
    )  # fmt: skip

    def status():
        return eval_in(checkout, "status", config, "--out", out)

    assert "10 units, 10 done" in status()
    library = checkout / "llava_hivtp"
    for file in ("model.py", "pruners/hivtp.py", "pruners/base.py", "vision.py"):
        text = (library / file).read_text().replace('"""', '"""Said otherwise. ', 1)
        (library / file).write_text(f"# A comment.\n{text}\n\n# Another one.\n")
    with (library / "cli.py").open("a") as file:
        file.write("\nMORE = 1\n")
    (library / "pruners" / "new.py").write_text("NEW = 1\n")
    with (library / "families" / "hf_llava.py").open("a") as file:  # not what prunes this model
        file.write("\nMORE = 1\n")
    known = library / "families" / "known.py"
    known.write_text(known.read_text().replace("FAMILIES = {", 'FAMILIES = {"New": "new:New",'))
    assert "10 units, 10 done" in status()

    with (library / "pruners" / "hivtp.py").open("a") as file:
        file.write("\nMORE = 1\n")
    with (checkout / "mine_score.py").open("a") as file:
        file.write("\nMORE = 1\n")
    text = status()
    assert "10 units, 6 done, 4 stale" in text
    assert "llava_hivtp.pruners.hivtp changed: 2 units" in text
    assert "mine_score changed: 2 units" in text
    with (library / "model.py").open("a") as file:
        file.write("\nMORE = 1\n")
    text = status()
    assert "0 done, 10 stale" in text
    assert "llava_hivtp.model changed: 6 units" in text

    (checkout / "mine.py").unlink()
    text = status()
    assert "pruner 'mine:Mine' cannot be imported" in text
    assert "0 done, 10 stale" in text


def test_status_names_every_state_and_the_reason(small, tmp_path):
    fill(small, tmp_path, full=(0.9, 0.6))
    rows = {row.id: row for row in small.rows}
    store_timing(tmp_path, small, rows["full"], "pope", 100, 20)
    failed = unit_path(tmp_path, small.model, rows["fopru"], "gqa")
    records.write_failure(failed, Failure("out of memory"))
    running = unit_path(tmp_path, small.model, rows["hivtp"], "pope")
    with store.locked(running):
        result = CliRunner().invoke(app, ["status", str(small.path), "--out", str(tmp_path)])
    said = "8 units, 2 done, 0 stale, 1 running, 0 begun, 1 failed, 0 damaged, 4 missing; 1 timed"
    assert said in result.stdout
    lines = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if line}
    assert lines["full"] == ["done", "untimed"]
    assert lines["fopru"] == ["-", "failed"]
    assert lines["hivtp"] == ["running", "-"]
    assert "fopru, gqa: out of memory" in result.stdout
