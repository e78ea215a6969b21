"""The tables' YAML says what the paper prints, and a mistake in it is found with its line."""

import re
import subprocess
import sys
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest

from eval.benchmarks.records import BENCHMARKS
from eval.plan.reader import ConfigError
from eval.plan.table import load_table, select_rows, select_tasks
from eval.plan.units import unit_path, units

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
TABLES = ["table1", "table2", "table3"]

# Sums over the printed tables, by column and by row, taken from a transcription of its own.
COLUMN_SUMS = {
    "table1": "retain 1042.8 tokens 6006 mme 30605.50 pope 1809.19 textvqa 909.09 mmb 1313.94 "
    "sqa 1465.92 ocr 623.80 gqa 1245.91 ai2d 1147.53 ttft_ms 2011 throughput 527.09",
    "table2": "retain 1045.2 tokens 27291 mme 30262.23 pope 1810.01 textvqa 1277.13 mmb 1385.31 "
    "sqa 1644.59 ocr 993.84 gqa 1327.34 ai2d 1374.00 ttft_ms 5505 throughput 365.56",
    "table3": "mme 13262.22 pope 866.26 ai2d 547.29",
}
ROW_SUMS = {
    "table1": "2764.03 2563.52 2552.34 2514.49 2560.56 2538.82 2313.27 2327.45 2293.94 2345.05 "
    "2355.20 2223.57 2251.67 2229.84 2228.60 2232.19 2073.56 2083.84 2066.96 2113.22 2075.65",
    "table2": "5113.93 4373.25 4349.47 4099.71 4351.67 4258.05 3572.96 3582.49 3342.28 3573.38 "
    "3565.16 3278.41 3297.53 3049.29 3263.87 3270.72 2839.84 2859.84 2551.22 2837.22 2850.92",
    "table3": "1620.29 1623.27 1637.48 1549.07 141.02 1637.48 1618.43 1595.42 1637.48 1615.83",
}


def table(name):
    return load_table(CONFIGS / f"{name}.yaml")


def row(name, identity):
    return next(row for row in table(name).rows if row.id == identity)


@pytest.mark.parametrize("name", TABLES)
def test_printed_numbers_add_up_to_the_paper_s(name):
    rows = [row for row in table(name).rows if row.printed]
    words = COLUMN_SUMS[name].split()
    for column, total in zip(words[::2], words[1::2], strict=True):
        assert sum(row.printed.get(column, 0) for row in rows) == Decimal(total), column
    assert [sum(row.printed.values()) for row in rows] == list(map(Decimal, ROW_SUMS[name].split()))


def test_odd_numbers_stay_as_printed():
    assert str(row("table1", "fopru-75").printed["gqa"]) == "53.41"
    assert str(row("table1", "fopru-75").printed["ocr"]) == "31.00"
    assert row("table1", "visionzip-40").printed["ttft_ms"] == 102
    assert row("table1", "hired-40").printed["tokens"] == 230
    assert str(row("table2", "hivtp-75").printed["retain"]) == "71.7"
    assert "mme" not in row("table3", "regions-1").printed


@pytest.mark.parametrize("name", ["table1", "table2"])
def test_only_rows_of_the_paper_have_printed_numbers(name):
    rows = table(name).rows
    columns = {BENCHMARKS[task].column for task in table(name).tasks}
    columns |= {"retain", "tokens", "ttft_ms", "throughput"}
    assert all(set(row.printed) == (columns if row.set == "paper" else set()) for row in rows)
    assert sum(row.set == "paper" for row in rows) == 21
    controls = {(row.pruner, row.block) for row in rows if row.set == "control"}
    assert controls == {
        (pruner, block)
        for pruner in ("random", "uniform", "avgpool", "cdpruner")  # the last by another question
        for block in (75, 50, 40, 25)
    }


@pytest.mark.parametrize(
    ("identity", "kept"),
    [
        ("full", 576),
        ("hivtp-75", 432),
        ("hivtp-50", 288),
        ("hivtp-40", 228),
        ("hivtp-25", 144),
        ("visionzip-75", 432),
        ("visionzip-40", 230),
        ("visionzip-25", 144),
        ("fopru-40", 230),
    ],
)
def test_budgets_are_those_of_the_paper(identity, kept):
    assert row("table1", identity).build().budget(1, 576) == kept


@pytest.mark.parametrize("number", [1, 2])
def test_transformers_classes_have_the_papers_rows_and_compare_no_counts_and_times(number):
    paper, own = table(f"table{number}"), table(f"transformers/table{number}")
    rows = [row for row in paper.rows if row.set != "tuned"]
    assert own.model.startswith("llava-hf/")
    assert own.layout == "unpad"
    assert [(r.id, r.arguments, r.where) for r in own.rows] == [
        (r.id, r.arguments, r.where) for r in rows
    ]
    for row, printed in zip(own.rows, rows, strict=True):
        assert row.layout == "unpad"
        gone = printed.printed.keys() - row.printed.keys()
        assert gone == ({"retain", "tokens", "ttft_ms", "throughput"} if printed.printed else set())
        assert row.printed.items() <= printed.printed.items()
    # One unit where the layout is the same, as everywhere: of its own where it is not.
    assert (own.rows[1].folder == rows[1].folder) is (number == 1)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("like: t.yaml", "like: u.yaml", "1: like must name a table's file, got 'u.yaml'"),
        ("layout: unpad", "layout: flat", "4: layout must be one of"),
        ("mme]", "time]", r"5: no row of it prints \['time'\]"),
        ("title: T", "tasks: [mme]", "2: unknown key 'tasks'"),
    ],
)
def test_a_mistake_in_a_table_like_another_is_named(tmp_path, old, new, message):
    (tmp_path / "t.yaml").write_text(GOOD)
    text = "like: t.yaml\ntitle: T\nmodels: [a/b]\nlayout: unpad\nunprinted: [mme]\n"
    path = tmp_path / "like.yaml"
    path.write_text(text)
    assert [dict(row.printed) for row in load_table(path).rows[1:2]] == [{"pope": Decimal("84.89")}]
    path.write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match=rf"like\.yaml:{message}"):
        load_table(path)


def test_arguments_reach_the_pruner_as_written():
    pruner = row("table3", "layers-20-23").build()
    assert (pruner.r, pruner.k, pruner.c, tuple(pruner.layers)) == (2, 25, 2, (20, 21, 22, 23))
    assert row("table3", "windows-none").build().c is None


def test_an_argument_the_pruner_does_not_take_is_an_error_with_the_line():
    odd = replace(row("table1", "fopru-75"), arguments={"kep": 0.75})
    with pytest.raises(ConfigError, match=r"table1\.yaml:\d+: row 'fopru-75': .*kep"):
        odd.build()


GOOD = """\
title: T
models: [some/model-7b]
layout: unpad
patches: 576
tasks: [mme, pope]
protocol: {mme: perception, pope: accuracy}
rows:
  - {id: full, pruner: none, block: 100}
  - {id: fopru-50, pruner: fopru, keep: 0.5, block: 50,
     printed: {mme: 1445.73, pope: 84.89}}
  - {id: hivtp-50, pruner: hivtp, r: 2, k: 25, c: 2, block: 50}
"""


def load(tmp_path, text):
    path = tmp_path / "t.yaml"
    path.write_text(text)
    return load_table(path)


def test_the_yaml_of_the_next_test_is_good(tmp_path):
    loaded = load(tmp_path, GOOD)
    assert [row.id for row in loaded.rows] == ["full", "fopru-50", "hivtp-50"]
    assert loaded.rows[1].arguments == {"keep": 0.5}


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("layout: unpad", "layuot: unpad", 3, "unknown key 'layuot'"),
        ("layout: unpad", "layout: flat", 3, "layout must be one of"),
        ("title: T\n", "", 1, "'title' is missing"),
        ("patches: 576", "patches: many", 4, "patches must be a count"),
        ("models: [some/model-7b]", "models: []", 2, "must be a list of names"),
        ("tasks: [mme, pope]", "tasks: [mme, poppe]", 5, "unknown task 'poppe'; choose from"),
        ("tasks: [mme, pope]", "tasks: []", 5, "tasks must be a list"),
        ("tasks: [mme, pope]\n", "", 1, "'tasks' is missing"),
        ("tasks: [mme, pope]", "tasks: [mme, pope, pope]", 5, "two tasks for the column 'pope'"),
        (", pope]\nprotocol: {mme: perception, pope: accuracy}",
         "]\nprotocol: {mme: perception}", 10, "no task of the table fills 'pope'"),
        ("mme: perception", "mme: total", 6, "its task measures 'perception'"),
        (", pope: accuracy", "", 6, "'pope' is missing"),
        ("pope: 84.89", "poppe: 84.89", 10, "unknown column 'poppe'"),
        ("pope: 84.89", "pope: n/a", 10, "must be a number"),
        ("pope: 84.89", "pope: .nan", 10, "is no number"),
        ("keep: 0.5,", "keep: 0.51,", 9, "may keep 293 of 576 tokens"),
        ("k: 25", "k: 26", 11, "its block of 50 % allows 288"),
        ("c: 2,", "c: 1,", 11, "may keep 576"),
        ("c: 2,", "c: 5,", 11, "c=5 does not divide the 24 x 24 grid"),
        ("pruner: hivtp", "pruner: hivpt", 11, "unknown pruner 'hivpt'; choose from"),
        ("c: 2,", "c: 2, q: 3,", 11, "takes no q"),
        ("k: 25", "k: -5", 11, "k"),
        ("k: 25", "k: 1:30", 11, "got '1:30'"),
        ("k: 25", "k: 010", 11, "got '010'"),
        ("k: 25", "k: {a: 1}", 11, "k must be a number, a word or a list"),
        ("k: 25", "k: !!timestamp 2020-01-01", 11, "k must be a number, a word or a list"),
        ("keep: 0.5, ", "", 9, "may keep 576 of 576 tokens, its block of 50 % allows 288"),
        ("fopru, keep: 0.5", "random", 9, "may keep 576 of 576 tokens"),
        ("fopru, keep: 0.5", "external_pruner:Unbounded", 9, "may keep 576 of 576 tokens"),
        ("block: 100", "block: true", 8, "block is r_max in percent"),
        ("patches: 576", "patches: true", 4, "patches must be a count"),
        ("title: T", "title: [T]", 1, "title must be text"),
        ("pruner: none", "pruner: 5", 8, "pruner must be text"),
        ("layout: unpad", "layout: [unpad]", 3, "layout must be one of"),
        ("title: T", "1: T", 1, "a key must be a word"),
        ("title: T", "[a]: T", 1, "a key must be a word"),
        ("title: T", "title: &t T\nother: *t", 2, "a table has no aliases"),
        ("title: T", "title: " + "[" * 5000, 1, "nested too deep"),
        ("title: T", 'title: "\x01"', 1, "a character that YAML does not allow"),
        ("block: 100", "block: full", 8, "block is r_max in percent"),
        (", block: 100", "", 8, "a row needs 'block'"),
        ("id: hivtp-50", "id: fopru-50", 11, "row 'fopru-50' is there twice"),
        ("id: hivtp-50", "id: 7", 11, "must fit"),
        ("id: hivtp-50", "id: paper", 11, "be no set"),
        ("c: 2,", "c: 2, set: ours,", 11, "set must be one of"),
        ("c: 2,", "c: 2, c: 3,", 11, "'c' is there twice"),
        ("rows:", "rows: [", 8, ""),
        ("rows:\n", "rows: all\nmore:\n", 8, "unknown key 'more'"),
    ],
)  # fmt: skip
def test_a_mistake_is_an_error_with_its_line(tmp_path, old, new, line, message):
    assert old in GOOD
    with pytest.raises(ConfigError) as error:
        load(tmp_path, GOOD.replace(old, new))
    assert f"t.yaml:{line}: " in str(error.value)
    assert message in str(error.value)


def test_rows_that_are_none_are_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"t.yaml:7: rows must be a list .*not empty"):
        load(tmp_path, GOOD[: GOOD.index("rows:")] + "rows: []\n")


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1", "utf-8-sig"])
def test_another_encoding_is_named_or_read(tmp_path, encoding):
    path = tmp_path / "t.yaml"
    path.write_bytes(
        GOOD.replace("title: T", "title: \N{LATIN SMALL LETTER E WITH ACUTE}").encode(encoding)
    )
    if encoding == "utf-8-sig":
        assert load_table(path).title == "\N{LATIN SMALL LETTER E WITH ACUTE}"
    else:
        with pytest.raises(ConfigError, match="a table is text in UTF-8"):
            load_table(path)


def test_an_alias_bomb_ends_at_once(tmp_path):
    bomb = "a: &a [x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)
    ).replace("*a0", "*a")
    with pytest.raises(ConfigError, match=r"t.yaml:2: a table has no aliases"):
        load(tmp_path, bomb)


def test_a_method_of_the_user_is_a_set_of_its_own(tmp_path):
    own = "  - {id: mine, pruner: 'external_pruner:LargestNorm', keep: 0.5, block: 50}\n"
    loaded = load(tmp_path, GOOD + own)
    assert [row.id for row in select_rows(loaded, "own")] == ["mine"]
    assert [row.id for row in select_rows(loaded, "paper")] == ["full", "fopru-50", "hivtp-50"]


def test_a_missing_or_empty_file_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load_table(tmp_path / "nothing.yaml")
    with pytest.raises(ConfigError, match="a table is a mapping"):
        load(tmp_path, "")


def test_the_model_can_be_replaced():
    assert table("table2").model == "liuhaotian/llava-v1.6-vicuna-7b"
    other = load_table(CONFIGS / "table2.yaml", "liuhaotian/llava-v1.6-mistral-7b")
    assert other.model in other.models
    assert other.rows == table("table2").rows


def test_settings_shared_by_two_tables_are_evaluated_once():
    def paths(name):
        return {unit.path for unit in units(table(name), "out")}

    # the unpruned row and HIVTP at 50 %, three tasks each
    assert len(paths("table1") & paths("table3")) == 6
    assert len(paths("table3")) == 3 * (len(table("table3").rows) - 2)
    assert not paths("table1") & paths("table2")


@pytest.mark.parametrize("name", ["table1", "table2"])
def test_different_rows_never_share_a_result(name):
    loaded = table(name)
    assert len(units(loaded, "out")) == len(loaded.rows) * len(loaded.tasks)


def test_what_shapes_a_result_shapes_its_path():
    base = row("table1", "hivtp-50")
    same = replace(base, id="other", block=75, where="", printed={})
    assert unit_path("o", "m", base, "mme") == unit_path("o", "m", same, "mme")
    reordered = replace(base, arguments=dict(reversed(base.arguments.items())))
    assert unit_path("o", "m", base, "mme") == unit_path("o", "m", reordered, "mme")
    others = [
        unit_path("o", "m", base, "mme"),
        unit_path("o", "m", base, "mme", limit=8),
        unit_path("o", "m", base, "pope"),
        unit_path("o", "n", base, "mme"),
        unit_path("o", "m", replace(base, layout="mosaic"), "mme"),
        unit_path("o", "m", replace(base, pruner="mine:HIVTP"), "mme"),
        unit_path("o", "m", replace(base, arguments={**base.arguments, "k": 24}), "mme"),
        unit_path("o", "m", replace(base, arguments={**base.arguments, "fill": True}), "mme"),
    ]
    assert len(set(others)) == len(others)
    assert others[0].parts[:2] == ("o", "m")


def test_a_checkpoint_has_one_folder_on_a_hub_and_on_a_disk():
    base = row("table1", "full")
    hub = unit_path("o", "liuhaotian/llava-v1.5-7b", base, "mme")
    assert hub == unit_path("o", "/data/llava-v1.5-7b/", base, "mme")


def test_rows_are_chosen_by_id_pattern_number_and_set():
    loaded = table("table1")

    def chosen(names):
        return [row.id for row in select_rows(loaded, names)]

    training_free = [row.id for row in loaded.rows if row.set != "tuned"]
    assert chosen(None) == chosen("") == training_free
    assert chosen("tuned") == ["tuned-25-projector", "tuned-25-lora"]
    assert chosen("hivtp-50 full") == ["full", "hivtp-50"]
    assert chosen("hivtp-*") == ["hivtp-75", "hivtp-50", "hivtp-40", "hivtp-25"]
    assert chosen("1,2") == ["full", "fopru-75"]
    assert len(chosen("paper,control")) == 37
    with pytest.raises(ConfigError, match="no row 'hivpt-50'; choose from full"):
        chosen("full,hivpt-50")


def test_tasks_are_chosen_by_name_and_column():
    loaded = table("table1")
    assert select_tasks(loaded, "mmb,mme") == ("mme", "mmbench_en_dev_static")
    assert select_tasks(loaded) == loaded.tasks
    with pytest.raises(ConfigError, match="no task 'vqav2'"):
        select_tasks(loaded, "vqav2")


def test_tables_are_read_without_llava():
    code = (
        "import sys, eval.plan.table, eval.report.table, eval.report.claims, eval.report.status\n"
        f"eval.plan.table.load_table({str(CONFIGS / 'table1.yaml')!r})\n"
        "print(sorted({'llava', 'transformers', 'lmms_eval'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout == "[]\n", found.stderr


ODD = (
    "true", "null", "-1", "0", "1.5", "1e999", ".inf", "99999999999999999999999", "''", "x", "' '",
    "2020-01-01", "!!binary aGk=", "!!set {a}", "1:30", "[]", "{}", "[[1]]", "{a: 1}", "[true]",
    "[1, x]", "'../..'", "['../..']", "[/]", "'a:B'", "!!int word", "!!python/object:os.system x",
    "2020", "\ud7ff",
)  # fmt: skip
ROW_KEYS = ("id", "pruner", "block", "section", "set", "name", "printed", "r", "k", "c", "layers")


def test_no_value_of_any_key_is_a_traceback(tmp_path):
    """Loaded or refused with file and line: what is loaded can name its folder and be built."""
    path, said = tmp_path / "t.yaml", []
    texts = [
        re.sub(rf"(?ms)^{key}: .*?$(?=\n\w)", f"{key}: {value}", GOOD)
        for key in ("title", "models", "layout", "patches", "tasks", "protocol")
        for value in ODD
    ]
    row = {"id": "odd", "pruner": "hivtp", "r": 2, "k": 25, "c": 2, "block": 50}
    for key in (*ROW_KEYS, "fill", "other"):
        for value in ODD:
            entries = ", ".join(f"{k}: {v}" for k, v in (row | {key: value}).items())
            texts.append(GOOD + f"  - {{{entries}}}\n")
    for text in texts:
        path.write_text(text, encoding="utf-8")
        try:
            loaded = load_table(path)
        except ConfigError as error:
            said.append(str(error))
            continue
        for unit in units(loaded, tmp_path):
            assert tmp_path in unit.path.resolve().parents, text
        assert all(row.absent or row.build() for row in loaded.rows)
    assert len(texts) == 19 * len(ODD)
    assert len(said) > len(texts) / 2
    assert [each for each in said if not each.startswith(f"{path}:")] == []


def test_positions_are_part_of_a_table_and_of_where_its_results_lie(tmp_path):
    text = (CONFIGS / "table1.yaml").read_text()
    packed = load_table(CONFIGS / "table1.yaml")
    (tmp_path / "kept.yaml").write_text(
        text.replace("layout: unpad", "positions: kept\nlayout: unpad")
    )
    kept = load_table(tmp_path / "kept.yaml")
    assert (packed.positions, kept.positions) == ("packed", "kept")
    assert all(
        one.folder != other.folder for one, other in zip(packed.rows, kept.rows, strict=True)
    )
    (tmp_path / "wrong.yaml").write_text(
        text.replace("layout: unpad", "positions: some\nlayout: unpad")
    )
    with pytest.raises(ConfigError, match="positions must be one of"):
        load_table(tmp_path / "wrong.yaml")


def test_the_readme_says_how_much_the_first_table_runs():
    shown, readme = table("table1"), " ".join((ROOT / "README.md").read_text().split())
    rows = len(select_rows(shown))
    units = rows * len(shown.tasks)
    assert f"runs all {rows} rows" in readme
    assert f"{units} units" in readme


def test_the_readme_activates_the_environment_before_it_calls_python():
    readme = (ROOT / "README.md").read_text()
    assert readme.index("source .venv/bin/activate") < readme.index("python -m eval")
