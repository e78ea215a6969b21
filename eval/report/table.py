"""A paper's table as text: ours, the paper's numbers, the difference.

Reads files only; needs no model, so that a table can be rebuilt anywhere.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from eval.benchmarks.records import BENCHMARKS
from eval.plan.names import display_name
from eval.plan.table import PREPARATION, TIMES, Row, Table
from eval.report import text
from eval.report.text import MISSING, Cell, Line
from eval.results.collect import DIGITS, Collected
from eval.results.compare import LEVEL, MEANS, Measured
from eval.results.stats import Paired

SHORT_PROTOCOL = (
    "checkpoint", "checkpoint digest", "dtype", "attention", "quantization", "batch size",
    "conversation template", "lmms-eval",
)  # fmt: skip
SHORT_PROVENANCE = ("commit", "device", "date")
PAIRED = ("difference", "p_value", "corrected", "same_answers")
HEADINGS = {
    "retain": "r_retain %",
    "tokens": "tokens",
    "entering": "entering",
    "newlines": "newlines",
    "mean": "mean",
    "relative": "% of unpruned",
    "ttft_ms": "TTFT ms",
    "throughput": "tokens/s",
    PREPARATION: "preparation ms",
    **{benchmark.column: benchmark.title for benchmark in BENCHMARKS.values()},
}
SETS = {
    "paper": "",
    "control": " (control)",
    "beyond": " (beyond the paper)",
    "own": " (own)",
    "tuned": " (tuned)",
}
INTERVALS = (
    "[low, high] is a 95 % confidence interval: Wilson's, with the number of questions that the "
    "spread between groups stands for (documents about one image are one group); by the delta "
    "method for % of unpruned."
)
LAYERS = (
    "Tokens, mean layer: patches that a layer of the language model reads and caches, on average "
    "over all layers, in every row; r_retain is of these. Where some are dropped between layers, "
    "entering says how many the first layer reads."
)
BOLD = (
    "Bold, ours: better than every other row of its block, each p < 0.05 (Holm within the block; "
    "times: intervals apart). Bold, paper: the highest number it prints in a block."
)


def render(found: Sequence[Collected], format: str, full: bool = False, width: int = 0) -> str:
    """Tables as text, one per checkpoint; as "md", "csv" or "latex".

    Args:
        found: what to show.
        format: how.
        full: list the whole protocol and provenance, not what matters most of it.
        width: letters of a line; wider Markdown tables are folded. 0: never.
    """
    if format == "csv":
        return _csv(found)
    if format == "latex":
        return "\n\n".join(_latex(collected, full) for collected in found)
    return "\n\n".join(_markdown(collected, full, width) for collected in found)


def method_name(row: Row) -> str:
    """`HIVTP (r=2, k=25, c=2)`; shares and splits follow from the block and are left out."""
    implied = {"keep", "dominant", "contextual"}
    shown = [word for word in row.spelled.split(",") if word.split("=")[0] not in implied | {""}]
    arguments = f" ({', '.join(shown)})" if shown else ""
    return (row.name or display_name(row.pruner) + arguments) + SETS[row.set]


def columns(collected: Collected) -> list[str]:
    """Columns to show: every benchmark, and the counts and times that somebody has."""
    benchmarks = [BENCHMARKS[task].column for task in collected.table.tasks]
    known = {name for row in collected.rows for name in (*row.values, *row.row.printed)}
    elsewhere = map(collected.table.printed_elsewhere, (row.row for row in collected.rows))
    known |= {name for papers in elsewhere for cells in papers.values() for name in cells}
    around = [
        ["retain", "tokens", "entering", "newlines"],
        benchmarks,
        list(MEANS),
        [*TIMES, PREPARATION],
    ]
    return [c for part in around for c in part if c in known or c in benchmarks]


def lines(collected: Collected) -> list[Line]:
    """Per row what we measured, what the paper prints, and the difference where there is one."""
    shown = columns(collected)
    printed_best = _printed_best(collected)
    found = []
    for measured in collected.rows:
        row = measured.row
        name = row.section, method_name(row)
        ours = [_ours(collected, measured, c) for c in shown]
        found.append(Line(*name, "ours", ours))
        found += _elsewhere(collected, measured, shown)
        if not row.printed or collected.limit is not None:
            continue
        theirs = [_theirs(collected, row, c, (row.id, c) in printed_best) for c in shown]
        found.append(Line(*name, "paper", theirs))
        deltas = [_number(collected.delta(measured, c), c, "+") for c in shown]
        if set(deltas) != {MISSING}:
            found.append(Line(*name, "Δ", [Cell(delta) for delta in deltas]))
    return found


def _elsewhere(collected: Collected, measured: Measured, shown: Sequence[str]) -> list[Line]:
    """What other papers print for a row, as they print it."""
    row, found = measured.row, []
    for paper, cells in collected.table.printed_elsewhere(row).items():
        there = {
            column: Cell(str(one.value), f"({one.differs})" if one.differs else "")
            for column, one in cells.items()
        }
        line = [there.get(column, Cell()) for column in shown]
        found.append(Line(row.section, method_name(row), paper, line))
    return found


def tests(collected: Collected) -> list[Line]:
    """Every row against the chosen one; empty without samples."""
    shown = _tested(collected)
    return [
        Line(
            measured.row.section,
            method_name(measured.row),
            "",
            [_paired(measured.paired.get(column)) for column in shown],
        )
        for measured in collected.rows
        if measured.paired
    ]


def footer(collected: Collected, full: bool = False) -> list[str]:
    """What the numbers mean, where they come from, and what is odd about them."""
    shown = collected.table
    meanings = [f"{HEADINGS[column]} {meaning}" for column, meaning in shown.protocol.items()]
    said = [f"Columns: {'; '.join(meanings)}. Layout {shown.layout}."]
    if shown.positions != "packed":
        said.append(f"Positions {shown.positions}.")
    if any(row.intervals for row in collected.rows):
        said += [INTERVALS, BOLD]
    if any("relative" in row.values for row in collected.rows):
        said.append(
            f"Mean: of the {len(shown.tasks)} benchmarks, each on 0 to 100; % of unpruned: mean of "
            "the scores in percent of the unpruned row's, the paper's from its cells."
        )
    if any("entering" in row.values for row in collected.rows):
        said.append(LAYERS)
    said += [_calibrated(row.row) for row in collected.rows if row.row.calibration]
    if shown.elsewhere:
        said.append(
            "Lines of other papers: as printed there (in what it is another measure than ours), % "
            "of unpruned over their own benchmarks; no difference is given. The sources stand in "
            "the file that `elsewhere` names."
        )
    if any(row.partial for row in collected.rows):
        said.append("(n/m): a mean over n of the table's m tasks; not compared.")
    if not collected.on_printed_model:
        said.append(f"The paper's numbers are about {shown.models[0]}, so no difference is given.")
    for column, split in collected.printed_on.items():
        if any(column in row.row.printed for row in collected.rows):
            said.append(
                f"{HEADINGS[column]}: the paper's numbers are of {split}, whose answers are "
                f"hidden, ours of {shown.protocol[column]}, so no difference is given."
            )
    if collected.timing_device:
        other = "" if collected.on_printed_device else ", so no difference is given"
        printed = f"; the paper's on {shown.device}{other}" if shown.device else ""
        said.append(f"Times: ours on {collected.timing_device}{printed}.")
    if collected.protocol:
        said.append(_protocol(collected, full))
    if collected.provenance:
        said.append(_provenance(collected, full))
    else:
        said.append("There are no results yet.")
    return [*said, *collected.notes]


def _calibrated(row: Row) -> str:
    """How a row's number of tokens was set."""
    how = row.calibration
    return (
        f"{method_name(row)}: an image decides how many tokens stay; set for {how.tokens:g} on "
        f"average, {how.reached:.1f} reached, on {how.sample} questions of {how.task} (seed "
        f"{how.seed}) with {how.model}."
    )


def _protocol(collected: Collected, full: bool) -> str:
    """All that was equal between the rows, or what one asks for first."""
    protocol = collected.protocol
    if full:
        return f"Protocol: {_listed(protocol.items())}."
    short = [f"{name} {protocol[name]}" for name in SHORT_PROTOCOL if name in protocol]
    return f"Protocol: {', '.join(short)}; {len(protocol) - len(short)} more with --protocol."


def _provenance(collected: Collected, full: bool) -> str:
    listed = {name: ", ".join(values) for name, values in collected.provenance.items()}
    if full:
        return f"Provenance: {_listed(listed.items())}."
    short = [f"{name} {listed[name]}" for name in SHORT_PROVENANCE if name in listed]
    return f"Provenance: {'; '.join(short)}."


def _title(collected: Collected) -> str:
    shown = collected.table
    title = f"{shown.title} ({shown.model})"
    if collected.limit is None:
        return title
    return f"DRY RUN over {collected.limit} documents per task, no result: {title}"


def _printed_best(collected: Collected) -> set[tuple[str, str]]:
    """(row id, column) of the best printed number in each section, ties included."""
    contested = {*_benchmarks(collected.table), *TIMES}
    found: dict[tuple[str, str], dict[str, float]] = {}  # (section, column) -> row id -> number
    for row in (measured.row for measured in collected.rows if measured.row.pruner != "none"):
        for column in contested & row.printed.keys():
            cells = found.setdefault((row.section, column), {})
            cells[row.id] = float(row.printed[column])
    best = set()
    for (_, column), cells in found.items():
        top = (min if column == "ttft_ms" else max)(cells.values())
        if len(cells) > 1:
            best |= {(row, column) for row, number in cells.items() if number == top}
    return best


def _ours(collected: Collected, measured: Measured, column: str) -> Cell:
    extra = []
    if column in measured.intervals:
        low, high = (_number(end, column) for end in measured.intervals[column])
        extra.append(f"[{low}, {high}]")
    if column in measured.partial:
        extra.append(f"({measured.partial[column]}/{len(collected.table.tasks)})")
    best = column in measured.best and collected.limit is None
    return Cell(_number(measured.values.get(column), column), " ".join(extra), best)


def _theirs(collected: Collected, row: Row, column: str, best: bool) -> Cell:
    """The printed number, with the split it is of where that is not ours."""
    if column == "relative" and (relative := collected.printed_relative(row)):
        return Cell(_number(relative, column))
    if column not in row.printed:
        return Cell()
    split = collected.printed_on.get(column)
    return Cell(str(row.printed[column]), f"({split})" if split else "", best)


def _paired(paired: Paired | None) -> Cell:
    if paired is None:
        return Cell()
    p_value = "< 0.001" if paired.corrected < 0.001 else f"{paired.corrected:.3f}"
    same = f"{100 * paired.same_answers:.1f} %"
    return Cell(f"{paired.difference:+.2f}", f"(p {p_value}), {same}", paired.corrected < LEVEL)


def _tests_are(collected: Collected) -> str:
    """What the second table shows."""
    cells = sum(len(measured.paired) for measured in collected.rows)
    return (
        f"Difference in points to {method_name(collected.against)} on the same documents, then the "
        "share of answers equal to its own. Two-sided p: McNemar exact where every document stands "
        "alone and is right or wrong, else a sign-flip permutation of the groups, normal for the "
        f"mean; corrected by Holm over the {cells} cells of this table, bold below 0.05."
    )


def _number(value: float | None, column: str, sign: str = "") -> str:
    return MISSING if value is None else f"{value:{sign}.{DIGITS.get(column, 2)}f}"


def _benchmarks(table: Table) -> list[str]:
    return [BENCHMARKS[task].column for task in table.tasks]


def _headings(collected: Collected) -> list[str]:
    """Of the columns; where some rows drop tokens between layers, what a count means."""
    shown = columns(collected)
    named = HEADINGS | ({"tokens": "tokens, mean layer"} if "entering" in shown else {})
    return [named[column] for column in shown]


def _markdown(collected: Collected, full: bool, width: int) -> str:
    parts = [
        f"## {_title(collected)}",
        text.markdown(_headings(collected), lines(collected), width),
        "\n".join(f"- {line}" for line in footer(collected, full)),
    ]
    tested = tests(collected)
    if tested:
        parts += [text.markdown(_test_headings(collected), tested, width), _tests_are(collected)]
    return "\n\n".join(parts)


def _latex(collected: Collected, full: bool) -> str:
    parts = [
        f"% {_title(collected)}",
        text.latex(_headings(collected), lines(collected)),
        *(f"% {line}" for line in footer(collected, full)),
    ]
    tested = tests(collected)
    if tested:
        parts.append(f"% {_tests_are(collected)}")
        parts.append(text.latex(_test_headings(collected), tested))
    return "\n".join(parts)


def _tested(collected: Collected) -> list[str]:
    """Columns of the second table."""
    means = any("mean" in measured.paired for measured in collected.rows)
    return [*_benchmarks(collected.table), *(["mean"] if means else [])]


def _test_headings(collected: Collected) -> list[str]:
    return [HEADINGS[column] for column in _tested(collected)]


def _csv(found: Sequence[Collected]) -> str:
    """One line per cell, with all that is known about it."""
    written = io.StringIO()
    writer = csv.writer(written, lineterminator="\n")
    names = "model limit row method set block column ours low high partial paper delta"
    writer.writerow([*names.split(), "against", *PAIRED])
    for collected in found:
        for measured in collected.rows:
            for column in columns(collected):
                writer.writerow(_record(collected, measured, column))
    return written.getvalue().rstrip("\n")


def _record(collected: Collected, measured: Measured, column: str) -> list[object]:
    row, paired = measured.row, measured.paired.get(column)
    low, high = measured.intervals.get(column, (None, None))
    return [
        row.checkpoint or collected.table.model,
        "" if collected.limit is None else collected.limit,
        row.id,
        method_name(row),
        row.set,
        row.section,
        column,
        _number(measured.values.get(column), column),
        _number(low, column),
        _number(high, column),
        measured.partial.get(column, ""),
        row.printed.get(column, MISSING),
        _number(collected.delta(measured, column), column, "+"),
        *([collected.against.id] if paired else [MISSING]),
        *(getattr(paired, name, MISSING) for name in PAIRED),
    ]


def _listed(entries: Iterable[tuple[str, str]]) -> str:
    return "; ".join(f"{name} {value}" for name, value in entries)
