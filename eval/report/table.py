"""A paper's table as text: ours, the paper's numbers, the difference.

Reads files only; needs neither torch nor a model, so that a table can be rebuilt anywhere.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence

from eval.benchmarks.records import BENCHMARKS
from eval.plan.names import display_name
from eval.plan.table import TIMES, Row, Table
from eval.report import text
from eval.report.text import MISSING, Cell, Line
from eval.results.collect import DIGITS, Collected, Measured
from eval.results.stats import Paired

HEADINGS = {
    "retain": "r_retain %",
    "tokens": "tokens",
    "newlines": "newlines",
    "ttft_ms": "TTFT ms",
    "throughput": "tokens/s",
    **{benchmark.column: benchmark.title for benchmark in BENCHMARKS.values()},
}
SETS = {"paper": "", "control": " (control)", "beyond": " (beyond the paper)"}
INTERVALS = (
    "± is half a 95 % confidence interval (normal theory with t quantiles, documents about one "
    "image as one group)."
)
TESTS = (
    "Difference in points to the unpruned row on the same documents (two-sided p: McNemar exact "
    "where every document stands alone and is right or wrong, else a sign-flip permutation of the "
    "groups; not corrected for the number of cells), then the share of answers equal to its own."
)


def render(found: Sequence[Collected], format: str) -> str:
    """Tables as text, one per checkpoint; as "md", "csv" or "latex"."""
    if format == "csv":
        return _csv(found)
    write = {"md": _markdown, "latex": _latex}[format]
    return "\n\n".join(write(collected) for collected in found)


def method_name(row: Row) -> str:
    """`HIVTP (r=2, k=25, c=2)`; shares and splits follow from the block and are left out."""
    implied = {"keep", "dominant", "contextual"}
    shown = [word for word in row.spelled.split(",") if word.split("=")[0] not in implied | {""}]
    arguments = f" ({', '.join(shown)})" if shown else ""
    return display_name(row.pruner) + arguments + SETS[row.set]


def columns(collected: Collected) -> list[str]:
    """Columns to show: every benchmark, and the counts and times that somebody has."""
    benchmarks = [BENCHMARKS[task].column for task in collected.table.tasks]
    known = {name for row in collected.rows for name in (*row.values, *row.row.printed)}
    around = [["retain", "tokens", "newlines"], benchmarks, list(TIMES)]
    return [c for part in around for c in part if c in known or c in benchmarks]


def lines(collected: Collected) -> list[Line]:
    """Per row what we measured, what the paper prints, and the difference where there is one."""
    shown = columns(collected)
    ours_best = _best(collected, shown, _comparable)
    printed_best = _best(collected, shown, _printed)
    found = []
    for measured in collected.rows:
        row = measured.row
        name = row.section, method_name(row)
        ours = [_ours(collected, measured, c, (row.id, c) in ours_best) for c in shown]
        found.append(Line(*name, "ours", ours))
        if not row.printed or collected.limit is not None:
            continue
        theirs = [_theirs(collected, row, c, (row.id, c) in printed_best) for c in shown]
        found.append(Line(*name, "paper", theirs))
        deltas = [_number(collected.delta(measured, c), c, "+") for c in shown]
        if set(deltas) != {MISSING}:
            found.append(Line(*name, "Δ", [Cell(delta) for delta in deltas]))
    return found


def tests(collected: Collected) -> list[Line]:
    """Every row against the unpruned one; empty without samples."""
    benchmarks = _benchmarks(collected.table)
    return [
        Line(
            measured.row.section,
            method_name(measured.row),
            "",
            [_paired(measured.paired.get(column)) for column in benchmarks],
        )
        for measured in collected.rows
        if measured.paired
    ]


def footer(collected: Collected) -> list[str]:
    """What the numbers mean, where they come from, and what is odd about them."""
    shown = collected.table
    meanings = [f"{HEADINGS[column]} {meaning}" for column, meaning in shown.protocol.items()]
    said = [f"Columns: {'; '.join(meanings)}. Layout {shown.layout}."]
    if any(row.half_widths for row in collected.rows):
        said.append(INTERVALS)
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
        said.append("Protocol: " + _listed(collected.protocol.items()) + ".")
    if collected.provenance:
        listed = [(name, ", ".join(values)) for name, values in collected.provenance.items()]
        said.append("Provenance: " + _listed(listed) + ".")
    else:
        said.append("There are no results yet.")
    return [*said, *collected.notes]


def _title(collected: Collected) -> str:
    shown = collected.table
    title = f"{shown.title} ({shown.model})"
    if collected.limit is None:
        return title
    return f"DRY RUN over {collected.limit} documents per task, no result: {title}"


def _best(
    collected: Collected,
    shown: Iterable[str],
    value: Callable[[Measured, str], float | None],
) -> set[tuple[str, str]]:
    """(row id, column) of the best number in each section, ties included, if there is a choice."""
    if collected.limit is not None:
        return set()
    contested = {*_benchmarks(collected.table), *TIMES} & set(shown)
    found: dict[tuple[str, str], dict[str, float]] = {}  # (section, column) -> row id -> number
    for measured in collected.rows:
        for column in contested:
            number = value(measured, column)
            if number is not None and measured.row.pruner != "none":
                cells = found.setdefault((measured.row.section, column), {})
                cells[measured.row.id] = number
    best = set()
    for (_, column), cells in found.items():
        top = (min if column == "ttft_ms" else max)(cells.values())
        if len(cells) > 1:
            best |= {(row, column) for row, number in cells.items() if number == top}
    return best


def _comparable(measured: Measured, column: str) -> float | None:
    """Ours as shown; a mean that lacks tasks competes with nobody."""
    number = measured.values.get(column)
    if number is None or column in measured.partial:
        return None
    return round(number, DIGITS.get(column, 2))


def _printed(measured: Measured, column: str) -> float | None:
    return measured.row.printed.get(column)


def _ours(collected: Collected, measured: Measured, column: str, best: bool) -> Cell:
    extra = ""
    if column in measured.half_widths:
        extra = f"± {_number(measured.half_widths[column], column)}"
    if column in measured.partial:
        extra = f"({measured.partial[column]}/{len(collected.table.tasks)})"
    return Cell(_number(measured.values.get(column), column), extra, best)


def _theirs(collected: Collected, row: Row, column: str, best: bool) -> Cell:
    """The printed number, with the split it is of where that is not ours."""
    if column not in row.printed:
        return Cell()
    split = collected.printed_on.get(column)
    return Cell(str(row.printed[column]), f"({split})" if split else "", best)


def _paired(paired: Paired | None) -> Cell:
    if paired is None:
        return Cell()
    p_value = "< 0.001" if paired.p_value < 0.001 else f"{paired.p_value:.3f}"
    same = f"{100 * paired.same_answers:.1f} %"
    return Cell(f"{paired.difference:+.2f}", f"(p {p_value}), {same}")


def _number(value: float | None, column: str, sign: str = "") -> str:
    return MISSING if value is None else f"{value:{sign}.{DIGITS.get(column, 2)}f}"


def _benchmarks(table: Table) -> list[str]:
    return [BENCHMARKS[task].column for task in table.tasks]


def _markdown(collected: Collected) -> str:
    parts = [
        f"## {_title(collected)}",
        text.markdown([HEADINGS[c] for c in columns(collected)], lines(collected)),
        "\n".join(f"- {line}" for line in footer(collected)),
    ]
    tested = tests(collected)
    if tested:
        parts += [text.markdown(_test_headings(collected), tested), TESTS]
    return "\n\n".join(parts)


def _latex(collected: Collected) -> str:
    parts = [
        f"% {_title(collected)}",
        text.latex([HEADINGS[c] for c in columns(collected)], lines(collected)),
        *(f"% {line}" for line in footer(collected)),
    ]
    tested = tests(collected)
    if tested:
        parts += [f"% {TESTS}", text.latex(_test_headings(collected), tested)]
    return "\n".join(parts)


def _test_headings(collected: Collected) -> list[str]:
    return [HEADINGS[column] for column in _benchmarks(collected.table)]


def _csv(found: Sequence[Collected]) -> str:
    """One line per cell, with all that is known about it."""
    written = io.StringIO()
    writer = csv.writer(written, lineterminator="\n")
    names = "model limit row method set block column ours half_width partial paper delta"
    writer.writerow([*names.split(), "difference", "p_value", "same_answers"])
    for collected in found:
        for measured in collected.rows:
            for column in columns(collected):
                writer.writerow(_record(collected, measured, column))
    return written.getvalue().rstrip("\n")


def _record(collected: Collected, measured: Measured, column: str) -> list[object]:
    row, paired = measured.row, measured.paired.get(column)
    return [
        collected.table.model,
        "" if collected.limit is None else collected.limit,
        row.id,
        method_name(row),
        row.set,
        row.section,
        column,
        _number(measured.values.get(column), column),
        _number(measured.half_widths.get(column), column),
        measured.partial.get(column, ""),
        row.printed.get(column, MISSING),
        _number(collected.delta(measured, column), column, "+"),
        *([paired.difference, paired.p_value, paired.same_answers] if paired else [MISSING] * 3),
    ]


def _listed(entries: Iterable[tuple[str, str]]) -> str:
    return "; ".join(f"{name} {value}" for name, value in entries)
