"""Records of the benchmarks: whole, told apart, and refusing what they cannot score."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from eval.benchmarks import data
from eval.benchmarks.record import Part, all_right, each
from eval.benchmarks.records import BENCHMARKS
from eval.plan.table import load_table

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"


def test_a_column_has_one_meaning_per_task():
    meanings = [(benchmark.column, benchmark.measures) for benchmark in BENCHMARKS.values()]
    assert len(set(meanings)) == len(meanings)
    titles = {benchmark.column: benchmark.title for benchmark in BENCHMARKS.values()}
    assert len(set(titles.values())) == len(titles)


@pytest.mark.parametrize(
    ("task", "limit", "documents"),
    [
        ("mme", None, 2374),
        ("mme", 10, 10),
        ("gqa", None, 12578),
        ("vizwiz_vqa_val", None, 4319),
        ("seedbench", 20000, 14233),
    ],
)
def test_documents_are_those_of_the_official_set_up_to_the_limit(task, limit, documents):
    assert BENCHMARKS[task].documents(limit) == documents


def test_a_limit_keeps_what_is_scored_together():
    BENCHMARKS["mme"].check_run(4)
    BENCHMARKS["pope"].check_run(3)
    with pytest.raises(ValueError, match="MME scores 2 questions together.*got 3"):
        BENCHMARKS["mme"].check_run(3)


@pytest.mark.parametrize("task", ["mmbench_en_dev", "mmbench_cn_dev"])
def test_a_judge_needs_a_key_before_anything_runs(monkeypatch, task):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match=f"{task} asks a remote model .* set OPENAI_API_KEY"):
        BENCHMARKS[task].check_run(None)
    monkeypatch.setenv("OPENAI_API_KEY", "a key")
    BENCHMARKS[task].check_run(None)


@pytest.mark.parametrize(
    ("scores", "plain", "together", "mme"),
    [
        ([1, 1], (2, 2), (1, 1), (2, 1)),
        ([1, 0], (1, 2), (0, 1), (0.5, 1)),
        ([0, 0], (0, 2), (0, 1), (0, 1)),
    ],
)
def test_groups_add_up_as_their_benchmark_counts(scores, plain, together, mme):
    assert each(scores) == plain
    assert all_right(scores) == together
    assert BENCHMARKS["mme"].tally(scores) == mme


def test_most_is_what_right_answers_give():
    assert BENCHMARKS["mme"].most == 2
    assert BENCHMARKS["mmbench_en_dev_static"].most == BENCHMARKS["gqa"].most == 1


def test_points_of_1000_are_percent_of_what_was_asked():
    assert BENCHMARKS["ocrbench"].shown(3.6, 40) == pytest.approx(90)
    assert BENCHMARKS["ocrbench"].shown(31.2, 1000) == 31.2
    assert BENCHMARKS["pope"].shown(50.0, 40) == 50.0


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("COCO_train2014_000000581857_16.jpg", "000000581857"),
        ("COCO_train2014_000000581857.jpg", "000000581857"),
        ("drawing.jpg", None),
    ],
)
def test_objects_of_one_image_are_one_group_of_refcoco(name, image):
    assert BENCHMARKS["refcoco_bbox_rec_testA"].group({"file_name": name}) == image


def test_splits_of_one_configuration_share_an_entry():
    head = data.front_matter([("default", "testA", ["data/a"]), ("default", "testB", ["data/b"])])
    assert head.count("config_name") == 1
    assert head.count("split:") == 2


def test_every_set_is_missing_from_an_empty_folder(tmp_path):
    lacking = data.missing(tmp_path, BENCHMARKS)
    assert set(lacking) == {part for b in BENCHMARKS.values() for part in b.data}
    assert Part("lmms-lab-encoder/VizWiz-VQA", "val", None, 4319) in lacking


def test_the_record_shown_in_the_readme_is_the_record():
    source = (ROOT / "eval/benchmarks/records.py").read_text()
    found = re.search(r'^    Benchmark\(\n        task="vizwiz.*?^    \)', source, re.M | re.S)
    assert f"```python\n{textwrap.dedent(found[0])}\n```" in (ROOT / "README.md").read_text()


def test_every_benchmark_beside_the_paper_s_is_listed():
    readme = (ROOT / "README.md").read_text()
    paper = {
        task for number in (1, 2, 3) for task in load_table(CONFIGS / f"table{number}.yaml").tasks
    }
    further = {benchmark.column for task, benchmark in BENCHMARKS.items() if task not in paper}
    assert all(f"`{column}`" in readme for column in further - {"mmb"})


def test_records_are_read_without_lmms_eval():
    code = (
        "import sys, eval.benchmarks.records;"
        "print(sorted({'torch', 'lmms_eval', 'pandas'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout == "[]\n", found.stderr
