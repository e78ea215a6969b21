"""The paper's claims, recomputed from its own cells and from our results.

What the text says, what the paper's cells say and what we measured stand side by side. Statements
without a number in the text are read off the tables; their exceptions are named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from eval.benchmarks.records import BENCHMARKS
from eval.markdown import pipes
from eval.plan.table import Table
from eval.report import text
from eval.results.collect import collect

BLOCKS = (75, 50, 40, 25)
GAINS = ("mme", "sqa")  # NeXT's benchmarks on which HIVTP is above the unpruned model throughout
TIME_TOLERANCE = 5.0  # percentage points within which another machine reproduces a change of time
SCORE_TOLERANCE = 0.5


class AbsentError(LookupError):
    """A claim needs a number that this source lacks."""


@dataclass(frozen=True)
class Cells:
    """The numbers of one table from one source: the paper, or our results."""

    table: Table
    values: Mapping[tuple[str, str], float]  # (row id, column) -> number

    def get(self, row: str, column: str) -> float:
        """A number, or `AbsentError`."""
        try:
            return self.values[row, column]
        except KeyError:
            raise AbsentError(f"{row}, {column}") from None

    def change(self, row: str, base: str, column: str) -> float:
        """Change of one row against another, in percent."""
        return 100 * (self.get(row, column) / self.get(base, column) - 1)

    def rivals(self, block: int) -> list[str]:
        """The paper's other methods at one r_max."""
        rows = [row for row in self.table.rows if row.set == "paper" and row.block == block]
        return [row.id for row in rows if row.pruner not in ("hivtp", "none")]

    @property
    def benchmarks(self) -> list[str]:
        """Its benchmark columns."""
        return [BENCHMARKS[task].column for task in self.table.tasks]


Source = Mapping[str, Cells]  # table1, table2, table3


@dataclass(frozen=True)
class Claim:
    """A change in percent that the text gives, or a statement, computed as its exceptions."""

    topic: str
    text: str
    compute: Callable[[Source], float | list[str]]
    said: float | None = None  # the number in the text
    tolerance: float = 0.0  # within which ours counts as the same


def report(printed: Source, ours: Source) -> str:
    """All claims as a Markdown table."""
    rows = [["about", "claim", "text", "paper's cells", "ours", "cells give it", "we find it"]]
    for claim in CLAIMS:
        said = "-" if claim.said is None else f"{claim.said:+.1f} %"
        cells, cells_hold = _judge(claim, printed, 0.0)
        found, found_hold = _judge(claim, ours, claim.tolerance)
        rows.append([claim.topic, claim.text, said, cells, found, cells_hold, found_hold])
    return f"{pipes(rows, left=7)}\n\n" + (
        "A change of ours counts as found within "
        f"{TIME_TOLERANCE:g} percentage points for times, {SCORE_TOLERANCE:g} for scores; "
        "a statement only without exceptions. `-`: not run, or nothing to compare with."
    )


def printed_cells(table: Table) -> Cells:
    """The paper's numbers."""
    return Cells(
        table,
        {(row.id, column): float(n) for row in table.rows for column, n in row.printed.items()},
    )


def measured_cells(table: Table, out: Path) -> Cells:
    """Our numbers; a mean that lacks tasks is none."""
    collected = collect(table, [row for row in table.rows if row.set == "paper"], out, tests=False)
    values = {
        (measured.row.id, column): number
        for measured in collected.rows
        for column, number in measured.values.items()
        if column not in measured.partial
    }
    return Cells(table, values)


def _judge(claim: Claim, source: Source, tolerance: float) -> tuple[str, str]:
    """(what a source says, whether that is the claim)."""
    try:
        found = claim.compute(source)
    except AbsentError:
        return text.MISSING, text.MISSING
    if isinstance(found, list):
        return ("without exception", "yes") if not found else (f"not {', '.join(found)}", "no")
    if claim.said is None:
        return f"{found:+.1f} %", text.MISSING
    holds = abs(round(found, 1) - claim.said) <= tolerance + 1e-9
    return f"{found:+.1f} %", "yes" if holds else "no"


def _gain(table: str, column: str, source: Source) -> float:
    """HIVTP at 25 % against the unpruned model."""
    return source[table].change("hivtp-25", "full", column)


def _largest_lead(leave_out: str, source: Source) -> float:
    """Largest drop of TTFT against a rival at the same r_max, on v1.5."""
    cells = source["table1"]
    return min(
        cells.change(f"hivtp-{block}", rival, "ttft_ms")
        for block in BLOCKS
        for rival in cells.rivals(block)
        if rival != leave_out
    )


def _mean_change(
    table: str, blocks: Iterable[int], without: Iterable[str], source: Source
) -> float:
    """Mean relative change of the scores against the unpruned model."""
    cells = source[table]
    changes = [
        cells.change(f"hivtp-{block}", "full", column)
        for block in blocks
        for column in cells.benchmarks
        if column not in without
    ]
    return sum(changes) / len(changes)


def _above_unpruned(table: str, columns: Iterable[str], source: Source) -> list[str]:
    cells = source[table]
    return [
        _cell(column, block)
        for block in BLOCKS
        for column in columns
        if cells.change(f"hivtp-{block}", "full", column) <= 0
    ]


def _best(table: str, columns: Iterable[str] | None, source: Source) -> list[str]:
    """Where a rival at the same r_max beats HIVTP."""
    cells = source[table]
    return [
        _cell(column, block)
        for block in BLOCKS
        for column in columns or cells.benchmarks
        if any(_beats(cells, rival, f"hivtp-{block}", column) for rival in cells.rivals(block))
    ]


def _best_ablation(section: str, chosen: str, source: Source) -> list[str]:
    """Columns in which another row of Table 3's section beats the chosen one."""
    cells = source["table3"]
    rows = [row for row in cells.table.rows if row.section == section and row.id != chosen]
    return [
        f"{_title(column)} ({row.id})"
        for column in cells.benchmarks
        for row in rows
        if column in row.printed and _beats(cells, row.id, chosen, column)
    ]


def _within_budget(source: Source) -> list[str]:
    return [
        f"{table} {block} %"
        for table in ("table1", "table2")
        for block in BLOCKS
        if source[table].get(f"hivtp-{block}", "retain") > block
    ]


def _consistent_shares(source: Source) -> list[str]:
    """Where r_retain is not tokens / unpruned tokens, beyond rounding."""
    return [
        f"{table} {block} %"
        for table in ("table1", "table2")
        for block in BLOCKS
        if abs(
            source[table].get(f"hivtp-{block}", "retain")
            - 100
            - source[table].change(f"hivtp-{block}", "full", "tokens")
        )
        > 0.15
    ]


def _beats(cells: Cells, rival: str, ours: str, column: str) -> bool:
    better = cells.get(rival, column) - cells.get(ours, column)
    return better < 0 if column == "ttft_ms" else better > 0


def _cell(column: str, block: int) -> str:
    return f"{_title(column)} {block} %"


def _title(column: str) -> str:
    titles = {benchmark.column: benchmark.title for benchmark in BENCHMARKS.values()}
    return titles.get(column, column)


CLAIMS = (
    Claim(
        "speed", "TTFT at 25 %, v1.5", partial(_gain, "table1", "ttft_ms"), -50.0, TIME_TOLERANCE
    ),
    Claim(
        "speed", "TTFT at 25 %, NeXT", partial(_gain, "table2", "ttft_ms"), -55.1, TIME_TOLERANCE
    ),
    Claim(
        "speed",
        "throughput at 25 %, v1.5",
        partial(_gain, "table1", "throughput"),
        60.9,
        TIME_TOLERANCE,
    ),
    Claim(
        "speed",
        "throughput at 25 %, NeXT",
        partial(_gain, "table2", "throughput"),
        47.3,
        TIME_TOLERANCE,
    ),
    Claim(
        "speed",
        "largest drop of TTFT against prior work, v1.5",
        partial(_largest_lead, ""),
        -26.5,
        TIME_TOLERANCE,
    ),
    Claim(
        "speed",
        "the same without VisionZip at 40 %, slower there than at 50 %",
        partial(_largest_lead, "visionzip-40"),
    ),
    Claim("speed", "no method has a lower TTFT, v1.5", partial(_best, "table1", ["ttft_ms"])),
    Claim("speed", "no method has a lower TTFT, NeXT", partial(_best, "table2", ["ttft_ms"])),
    Claim(
        "speed", "no method has a higher throughput, v1.5", partial(_best, "table1", ["throughput"])
    ),
    Claim(
        "speed", "no method has a higher throughput, NeXT", partial(_best, "table2", ["throughput"])
    ),
    Claim(
        "accuracy",
        "mean change, v1.5, all ratios and benchmarks",
        partial(_mean_change, "table1", BLOCKS, ()),
        -2.8,
        SCORE_TOLERANCE,
    ),
    *(
        Claim(
            "accuracy",
            f"mean change, v1.5 at {block} %",
            partial(_mean_change, "table1", (block,), ()),
        )
        for block in BLOCKS
    ),
    Claim(
        "accuracy",
        "above the unpruned model on MME and ScienceQA, NeXT",
        partial(_above_unpruned, "table2", GAINS),
    ),
    Claim(
        "accuracy",
        "mean change on the other six benchmarks, NeXT",
        partial(_mean_change, "table2", BLOCKS, GAINS),
        -0.8,
        SCORE_TOLERANCE,
    ),
    *(
        Claim(
            "accuracy",
            f"mean change, NeXT at {block} %",
            partial(_mean_change, "table2", (block,), ()),
        )
        for block in BLOCKS
    ),
    Claim("accuracy", "no method scores higher, v1.5", partial(_best, "table1", None)),
    Claim("accuracy", "no method scores higher, NeXT", partial(_best, "table2", None)),
    Claim("tokens", "HIVTP stays within r_max", _within_budget),
    Claim("tokens", "r_retain is tokens over unpruned tokens", _consistent_shares),
    Claim(
        "ablation",
        "layers 7-10 score best of four choices",
        partial(_best_ablation, "layers", "layers-7-10"),
    ),
    Claim(
        "ablation",
        "2 x 2 regions score best of 1, 2, 3",
        partial(_best_ablation, "regions", "regions-2"),
    ),
    Claim(
        "ablation",
        "2 x 2 windows score best of none, 2, 3",
        partial(_best_ablation, "windows", "windows-2"),
    ),
)
