"""The demo from end to end, and what its summary says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from eval.benchmarks.records import BENCHMARKS
from eval.nano import demo
from eval.nano.demo import PARTS
from eval.plan.table import select_rows
from eval.results import stats
from eval.results.means import difference, mean, relative
from eval.results.records import Sample
from llava_hivtp import PRUNERS
from llava_hivtp.pruners import LAYER_PRUNERS

ROOT = Path(__file__).parents[1]


def samples(scores, groups=None, strata=None):
    return [
        Sample(
            doc_id=i,
            answer=str(score),
            score=score,
            group=str(groups[i] if groups else i),
            stratum=strata[i] if strata else "",
        )
        for i, score in enumerate(scores)
    ]


def test_every_benchmark_weighs_the_same_whatever_its_scale():
    """MME of five categories is right to the last pair at 1000 points, the others at 100."""
    pairs, strata = [i // 2 for i in range(20)], [str(i // 4) for i in range(20)]
    right = {
        "mme": stats.group(BENCHMARKS["mme"], samples([1.0] * 20, pairs, strata)),
        "pope": stats.group(BENCHMARKS["pope"], samples([1.0] * 7)),
        "mmbench_en_dev_static": stats.group(
            BENCHMARKS["mmbench_en_dev_static"], samples([1.0] * 8, [i // 4 for i in range(8)])
        ),
    }
    assert stats.score(right["mme"]) == 1000
    assert mean(right).value == pytest.approx(100)
    assert mean(right).interval is None  # no spread says nothing


def test_a_pair_half_right_counts_as_mme_counts_it():
    row = {
        "mme": stats.group(
            BENCHMARKS["mme"], samples([1.0, 0.0, 1.0, 1.0], [0, 0, 1, 1], ["a"] * 4)
        )
    }
    assert mean(row).value == pytest.approx(stats.score(row["mme"]) / 2)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(400):
        row = {
            task: stats.group(BENCHMARKS[task], samples((rng.random(60) < share).astype(float)))
            for task, share in (("pope", 0.8), ("gqa", 0.5))
        }
        low, high = mean(row).interval
        covered += low <= 65 <= high
    assert 0.91 < covered / 400 < 0.98


def test_a_difference_pairs_the_documents():
    rng = np.random.default_rng(1)
    hard = (rng.random(200) < 0.5).astype(float)
    worse = hard * (rng.random(200) < 0.9)
    one, other = ({"pope": stats.group(BENCHMARKS["pope"], samples(x))} for x in (hard, worse))
    gap = difference(one, other)
    assert gap.value == pytest.approx(100 * (hard - worse).mean())
    low, high = mean(one).interval
    assert 2 * gap.half < high - low  # what both find hard tells nothing between them
    assert gap.p_value < 0.01
    assert difference(one, one).p_value == 1


def test_percent_of_the_unpruned_row_covers_the_truth():
    """Two benchmarks kept at 90 and 80 % of the unpruned row's: 85 % on average."""
    rng, covered = np.random.default_rng(2), 0
    for _ in range(400):
        full, row = {}, {}
        for task, share, kept in (("pope", 0.8, 0.9), ("gqa", 0.5, 0.8)):
            before = rng.random(200) < share
            after = before & (rng.random(200) < kept)
            for found, values in ((full, before), (row, after)):
                found[task] = stats.group(BENCHMARKS[task], samples(values.astype(float)))
        low, high = relative(row, full).interval
        covered += low <= 85 <= high
    assert 0.92 < covered / 400 < 0.98
    assert relative(full, full).value == 100
    assert relative(full, full).interval is None


def test_rows_about_other_documents_are_not_compared():
    one, other = ({"pope": stats.group(BENCHMARKS["pope"], samples([1.0] * n))} for n in (3, 4))
    with pytest.raises(ValueError, match="different documents"):
        difference(one, other)
    assert relative(one, other) is None


@pytest.mark.slow
def test_the_demo_makes_three_tables_a_plot_and_a_summary(tmp_path):
    command = [sys.executable, "-m", "eval.nano", "demo", "--out", str(tmp_path)]
    command += ["--rows", "full hivtp-25 random-25", "--limit", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    made = tmp_path / "quick"
    for number in (1, 2, 3):
        text = (made / f"table{number}.md").read_text()
        assert text.startswith("This is the embedded model")
        assert "HIVTP" in text
    assert (made / "pareto.png").stat().st_size > 10_000
    lines = done.stdout.strip().splitlines()  # a busy machine adds warnings to the times
    # Four questions a set are too few for an interval.
    full = r"unpruned: [\d.]+ of 100, mean of 8 benchmarks \(blind "
    for start in (full, r"25 % of the tokens: HIVTP", r"first token: "):
        assert any(re.match(start, line) for line in lines), start
    path = lines[-1]
    assert Path(path.split(" (")[0]).is_file()


def test_the_demo_says_where_its_minutes_went(tmp_path, monkeypatch):
    for name in ("_draw", "_answer", "_time"):
        monkeypatch.setattr(demo, name, lambda _: None)
    monkeypatch.setattr(demo, "_write", lambda _: (tmp_path, []))
    moments = [0, 60, 60, 360, 360, 420, 420, 432]  # seconds, before and behind every stage
    passed, worked = iter(moments), iter(moments)
    monkeypatch.setattr(demo, "time", SimpleNamespace(monotonic=lambda: next(passed)))
    monkeypatch.setattr(demo, "_worked", lambda: 2 * next(worked))
    assert demo.run_demo(demo.Demo(tmp_path))[-1] == (
        f"{tmp_path} (7.2 minutes, of CPUs 14.4: drawing 1.0 (2.0), answers 5.0 (10.0), "
        "times 1.0 (2.0), tables 0.2 (0.4))"
    )


def test_the_quick_demo_has_the_papers_rows_and_every_other_method(tmp_path):
    first, second, _, _ = (shelf.rows for shelf, _ in demo.Demo(tmp_path).shelves())
    table, anyres = (part.table() for part in PARTS[:2])
    paper = select_rows(table, "paper")
    assert {row.id for row in paper} < {row.id for row in first}
    others = {row.pruner for row in first} - {row.pruner for row in paper}
    assert others == (PRUNERS.keys() | LAYER_PRUNERS.keys()) - {row.pruner for row in paper}
    assert second == select_rows(anyres, "paper")
    full = [shelf.rows for shelf, _ in demo.Demo(tmp_path, "full").shelves()]
    assert full[:2] == [table.rows, anyres.rows]


def test_every_method_has_a_row_at_every_block_of_the_first_table():
    table = PARTS[0].table()
    for block in {row.block for row in table.rows if row.pruner != "none"}:
        found = {row.pruner for row in table.rows if row.block == block} - LAYER_PRUNERS.keys()
        assert found == set(PRUNERS) - {"none"}, block
    assert {row.pruner for row in table.rows} == PRUNERS.keys() | LAYER_PRUNERS.keys()
