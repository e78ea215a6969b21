"""Numbers of other papers stand beside the rows they are about, and say in what they differ."""

import re
from pathlib import Path

import pytest

from eval.benchmarks.records import BENCHMARKS
from eval.plan.elsewhere import COLUMNS, read_elsewhere
from eval.plan.reader import ConfigError
from eval.plan.table import load_table
from eval.report.table import lines, render
from eval.results.collect import collect
from llava_hivtp.pruners import find_pruner

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
TABLE = """\
title: Small
models: [lab/tiny-7b]
layout: unpad
patches: 576
elsewhere: small.csv
tasks: [pope, gqa]
protocol: {pope: accuracy, gqa: testdev balanced}
rows:
  - {id: full, pruner: none, block: 100}
  - {id: vispruner-64, pruner: vispruner, keep: 0.1112, block: 12, section: 64 tokens}
  - {id: cdpruner-64, pruner: cdpruner, keep: 0.1112, block: 12, section: 64 tokens}
  - {id: other-64, pruner: cdpruner, keep: 0.1112, question: other, block: 12, section: 64 tokens, set: control}
  - {id: vispruner-32, pruner: vispruner, keep: 0.0556, block: 6, section: 32 tokens}
"""  # noqa: E501
NUMBERS = """\
A,Table 1,tiny-7b,pope,F1,none,576,85.9,a.org
A,Table 1,tiny-7b,gqa,,none,576,61.9,a.org
A,Table 1,tiny-7b,gqa,,vispruner,64,55.40,a.org
B,Table 2,tiny-7b,gqa,,vispruner,64,55.8,b.org
A,Table 1,tiny-7b,relative,,cdpruner,64,95.1,a.org
A,Table 1,other-7b,gqa,,vispruner,32,50.0,a.org
"""


@pytest.fixture
def small(tmp_path):
    (tmp_path / "small.yaml").write_text(TABLE)
    write(tmp_path, NUMBERS)
    return tmp_path / "small.yaml"


def write(folder, numbers, columns=COLUMNS):
    (folder / "small.csv").write_text(f"{','.join(columns)}\n{numbers}")


def test_all_papers_stand_beside_the_row_and_no_other(small, tmp_path):
    table = load_table(small)
    found = [
        (line.section, line.source, *(f"{cell.text} {cell.extra}".strip() for cell in line.cells))
        for line in lines(collect(table, table.rows, tmp_path))
        if line.source != "ours"
    ]
    assert found == [
        ("100 %", "A, Table 1", "85.9 (F1)", "61.9", "-"),
        ("64 tokens", "A, Table 1", "-", "55.40", "-"),
        ("64 tokens", "B, Table 2", "-", "55.8", "-"),
        ("64 tokens", "A, Table 1", "-", "-", "95.1"),
    ]


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ("A,1,tiny-7b,gqa,,none,576,many,a.org", "csv:2: .*many|csv:2: .*ConversionSyntax"),
        ("A,1,tiny-7b,gqa,,none,576,NaN,a.org", "csv:2: NaN is no number"),
        ("A,1,tiny-7b,gqa,,none,some,1,a.org", "csv:2: .*'some'"),
        ("A,1,tiny-7b,gqa,,none,576,1,", "csv:2: a field is missing"),
        ("A,1,tiny-7b,gqa,,none,576,1,a.org,b", "csv:2: a field is missing"),
        ("A,1,other-7b,gqa,,none,576,1,a.org", "yaml:5: small.csv has no number for tiny-7b"),
    ],
)
def test_a_mistake_is_named_with_its_line(small, tmp_path, numbers, message):
    write(tmp_path, numbers)
    with pytest.raises(ConfigError, match=message):
        load_table(small)


def test_a_file_that_is_missing_or_another_one_is_refused(small, tmp_path):
    write(tmp_path, NUMBERS, COLUMNS[1:])
    with pytest.raises(ConfigError, match="csv:1: the columns must be paper,table"):
        load_table(small)
    (tmp_path / "small.csv").unlink()
    with pytest.raises(ConfigError, match="No such file"):
        load_table(small)


def test_every_number_of_the_field_is_about_something_known_and_has_a_source():
    columns = {benchmark.column for benchmark in BENCHMARKS.values()} | {"relative"}
    numbers = read_elsewhere(CONFIGS / "field.csv")
    assert {one.benchmark for one in numbers} <= columns
    for name in {one.method for one in numbers}:
        find_pruner(name)  # an error if there is none
    full = {"llava-v1.5-7b": 576, "llava-v1.6-vicuna-7b": 2880}
    assert {one.tokens for one in numbers if one.method == "none"} == set(full.values())
    assert all(one.tokens < full[one.model] for one in numbers if one.method != "none")
    keys = [(o.paper, o.table, o.model, o.benchmark, o.method, o.tokens) for o in numbers]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("name", ["field", "field_next"])
def test_every_number_of_a_model_is_shown_in_its_table(name, tmp_path):
    table = load_table(CONFIGS / f"{name}.yaml")
    shown = [cells for row in table.rows for cells in table.printed_elsewhere(row).values()]
    models = {Path(model).name for model in table.models}
    here = [one for one in table.elsewhere if one.model in models]
    assert sum(map(len, shown)) == len(here)
    text = render([collect(table, table.rows, tmp_path)], "md")
    assert re.search(r"RESTORE, Table \d +\|", text)
