"""What the three tables say in a few lines: the mean of the eight benchmarks, with intervals."""

from __future__ import annotations

from collections.abc import Mapping

from eval.benchmarks.records import BENCHMARKS
from eval.plan.table import Row, Table
from eval.results import stats, times
from eval.results.means import Difference, Scored, difference, in_percent, mean, relative
from eval.results.records import Timing
from eval.results.shelf import Shelf

TIMED = "pope"  # one task's requests are enough to time a row


def scored(shelf: Shelf, row: Row) -> Scored | None:
    """The stored samples of a row, or None while a task is missing."""
    found: dict[str, stats.Groups] = {}
    for task in shelf.tasks:
        samples = shelf.samples(shelf.unit(row, task))
        if not samples:
            return None
        found[task] = stats.group(BENCHMARKS[task], samples)
    return found


def report(shelf: Shelf, blind: Shelf) -> tuple[str, list[str]]:
    """Markdown of what the demo found, and the three lines that matter."""
    table = shelf.table
    rows = {row.id: scored(shelf, row) for row in table.rows}
    whole = {name: found for name, found in rows.items() if found}
    full = whole.get("full")
    if full is None:
        raise ValueError(f"{shelf.out}: the unpruned row is not complete; run the demo again")
    unseen = scored(blind, table.unpruned)
    leads = _leads(table, whole)
    text = [
        *_benchmarks(full, unseen),
        "",
        *_means(table, whole, leads),
        "",
        *_losses(table, leads),
    ]
    return "\n".join(text), _headlines(shelf, whole, unseen)


def _benchmarks(full: Scored, unseen: Scored | None) -> list[str]:
    """Every benchmark beside what the same model scores when the pictures are hidden."""
    lines = ["| benchmark (0 to 100) | unpruned | blind |", "|---|---:|---:|"]
    for task, groups in full.items():
        hidden = f"{in_percent(unseen[task]):.1f}" if unseen else "-"
        lines.append(f"| {BENCHMARKS[task].title} | {in_percent(groups):.1f} | {hidden} |")
    hidden = f"{mean(unseen)}" if unseen else "-"
    return [*lines, f"| **mean of {len(full)}** | **{mean(full)}** | {hidden} |"]


def _leads(table: Table, whole: Mapping[str, Scored]) -> dict[str, tuple[Difference, float]]:
    """HIVTP's lead over every other row of its block, by row, and its p-value after Holm."""
    found = {
        row.id: difference(whole[f"hivtp-{row.block}"], whole[row.id])
        for row in table.rows
        if row.id in whole and f"hivtp-{row.block}" in whole and row.pruner not in ("none", "hivtp")
    }
    corrected = stats.holm([lead.p_value for lead in found.values()])
    return dict(zip(found, zip(found.values(), corrected, strict=True), strict=True))


def _means(
    table: Table, whole: Mapping[str, Scored], leads: Mapping[str, tuple[Difference, float]]
) -> list[str]:
    """Mean of the benchmarks per row, its share of the unpruned one, and HIVTP's lead over it."""
    lines = [
        "| r_max % | method | mean of the benchmarks | % of unpruned | HIVTP minus it |",
        "|---:|---|---:|---:|---:|",
    ]
    for row in (row for row in table.rows if row.id in whole):
        lead, p_value = leads.get(row.id, (None, 1.0))
        lines.append(
            f"| {row.block} | {row.pruner} | {mean(whole[row.id])} | "
            f"{relative(whole[row.id], whole['full']) or '-'} | "
            f"{lead.said(p_value) if lead else ''} |"
        )
    return [*lines, "", f"p-values of the last column: Holm over its {len(leads)} comparisons."]


def _losses(table: Table, leads: Mapping[str, tuple[Difference, float]]) -> list[str]:
    """Where another method of the same budget is ahead of HIVTP."""
    lines = [
        f"- at {row.block} %: {row.pruner} is ahead of HIVTP by "
        f"{Difference(-lead.value, lead.half).said(p_value)}"
        for row in table.rows
        if row.id in leads
        for lead, p_value in [leads[row.id]]
        if lead.value < 0
    ]
    return ["Where HIVTP loses:", "", *(lines or ["- nowhere in this run"])]


def _headlines(shelf: Shelf, whole: Mapping[str, Scored], unseen: Scored | None) -> list[str]:
    full = whole["full"]
    blind = f" (blind {mean(unseen)})" if unseen else ""
    lines = [f"unpruned: {mean(full)} of 100, mean of {len(full)} benchmarks{blind}"]
    least = min(row.block for row in shelf.rows)
    ours, chance = whole.get(f"hivtp-{least}"), whole.get(f"random-{least}")
    if ours and chance:
        lead = difference(ours, chance)
        lines.append(
            f"{least} % of the tokens: HIVTP {mean(ours)}, a random choice {mean(chance)}: "
            f"{lead.said(lead.p_value)}"
        )
    lines += _first_tokens(shelf, "full", f"hivtp-{least}", f"at {least} %")
    return lines


def _first_tokens(shelf: Shelf, base: str, ours: str, said: str) -> list[str]:
    """TTFT of two rows on the task that was timed, and their ratio request by request."""
    found = {row.id: shelf.timing(shelf.unit(row, TIMED)) for row in shelf.rows}
    first, second = found.get(base), found.get(ours)
    if first is None or second is None:
        return []
    line = f"first token: {_ttft(first)} unpruned, {_ttft(second)} {said}"
    if ratio := times.paired_ratio(second, first):
        line += f"; ratio {ratio[0]:.2f} ± {ratio[1]:.2f}"
    line += f" (means of {first.requests} requests, in turn; ± of 95 %)"
    doubts = dict.fromkeys([*(first.warnings or []), *(second.warnings or [])])
    return [line, *(f"WARNING: {doubt}: no measurement" for doubt in doubts)]


def _ttft(timing: Timing) -> str:
    around = times.interval("ttft_ms", [timing])
    half = f" ± {(around[1] - around[0]) / 2:.1f}" if around else ""
    return f"{timing.ttft_ms:.1f}{half} ms"
