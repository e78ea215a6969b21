"""The embedded field table: its pairs are rows of it, and a report says what is there."""

import csv
import io

import pytest
from stored import store_result

from eval.nano.field import PAIRS, TABLES, Field, run_field
from eval.nano.studio import Studio
from eval.plan.table import select_rows


def stored(field, name, row, share, questions=40):
    """Every set's first questions right, the others wrong."""
    table = field.table(name)
    (found,) = select_rows(table, row)
    right = round(share * questions)
    for task in table.tasks:
        rights = [1.0] * right + [0.0] * (questions - right)
        store_result(field.out / "results-sample", table, found, task, rights)


@pytest.fixture
def field(tmp_path):
    return Field(tmp_path, sizes=("sample",), as_is=True)


def test_every_pair_is_of_rows_that_keep_equally_many(field):
    rows = {
        prefix + row.id: row
        for name, prefix in zip(TABLES, ("", "kept:"), strict=True)
        for row in field.table(name).rows
    }
    for pair in PAIRS:
        for count in pair.counts:
            one, other = (rows[f"{name}-{count}"] for name in (pair.one, pair.other))
            assert one.section == other.section


def test_kept_rows_are_those_of_the_field_but_for_their_positions(field):
    packed = {row.id: row for row in field.table("field").rows}
    for row in field.table("field_kept").rows:
        assert row.positions == "kept"
        assert row.arguments == packed[row.id].arguments


def test_the_report_pairs_rows_and_says_what_holds(field):
    stored(field, "field", "full", 1.0)
    for count in (25, 11):
        stored(field, "field", f"hivtp-{count}", 0.5)
        stored(field, "field", f"divprune-{count}", 0.75)
        stored(field, "field", f"hivtp-both-{count}", 0.25)
        stored(field, "field_kept", f"hivtp-{count}", 0.5)
    text, numbers = run_field(field)
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line[:1] == "|"}
    assert "+25.0" in lines["DivPrune, not HIVTP"]
    assert lines["DivPrune, not HIVTP"].endswith("holds |")
    assert "-25.0" in lines["HIVTP merged and weighed"]
    assert lines["HIVTP merged and weighed"].endswith("reversed |")
    assert "+0.0 ± 0.0" in lines["HIVTP at kept positions"]
    assert lines["HIVTP at kept positions"].endswith("not shown |")
    assert "SCOPE, not HIVTP" not in lines
    assert "abc1234" in text
    cells = list(csv.DictReader(io.StringIO(numbers)))
    assert {cell["positions"] for cell in cells} == {"packed", "kept"}
    (mean,) = [c for c in cells if (c["row"], c["benchmark"]) == ("divprune-25", "mean")]
    assert float(mean["low"]) < float(mean["percent"]) == 75 < float(mean["high"])


def test_sizes_draw_pictures_of_their_own(monkeypatch):
    from eval.nano import datasets

    seeds = {}
    for size in datasets.SIZES:
        monkeypatch.setattr(
            datasets,
            "Studio",
            lambda seed, *rest, size=size: seeds.setdefault(size, []).append(seed) or Studio(seed),
        )
        monkeypatch.setattr(datasets, "PAPER_SETS", [lambda studio, rows: []] * 8)
        datasets.build(size)
    drawn = [seed for each in seeds.values() for seed in each]
    assert len(set(drawn)) == len(drawn) == 24
