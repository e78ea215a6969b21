"""The field on the embedded model: every method at four counts, and pairs of rows."""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from eval import ROOT
from eval.benchmarks.records import BENCHMARKS
from eval.machine import device_name
from eval.markdown import pipes
from eval.nano.summary import scored
from eval.plan.table import Row, Table, load_table
from eval.results import stats
from eval.results.compare import LEVEL
from eval.results.means import Difference, Scored, difference, mean, relative
from eval.results.shelf import Shelf

CONFIGS = ROOT / "configs" / "nano"
TABLES = ("field", "field_kept")
SIZES = ("sample", "quick")  # 160 questions a set, 40 of other pictures
COUNTS = (25, 17, 11, 6)  # percent, as the ids of rows end
INSIDE = (50,)


@dataclass(frozen=True)
class Pair:
    """A row against another of the same count; `kept:` rows are of the table of kept positions."""

    said: str
    one: str
    other: str
    earlier: float | None = None  # points that a study before this one found, on another engine
    counts: tuple[int, ...] = COUNTS


PAIRS = (
    Pair("CDPruner: its own question, not another's", "cdpruner", "cdpruner-other", 1.9),
    Pair("CDPruner, not DivPrune", "cdpruner", "divprune", -6.1),
    Pair("HIVTP at kept positions", "kept:hivtp", "hivtp", 1.5),
    Pair("DivPrune at kept positions", "kept:divprune", "divprune"),
    Pair("random at kept positions", "kept:random", "random"),
    Pair("HIVTP merged and weighed", "hivtp-both", "hivtp", 3.6),
    Pair("HIVTP merged only", "hivtp-merge", "hivtp", 0.6),
    Pair("HIVTP weighed only", "hivtp-weigh", "hivtp", 0.6),
    Pair("DivPrune merged and weighed", "divprune-both", "divprune"),
    Pair("VisionZip weighed", "visionzip-weigh", "visionzip"),
    Pair("PruMerge weighed", "prumerge-weigh", "prumerge"),
    Pair("average pooling weighed", "avgpool-weigh", "avgpool"),
    Pair("DivPrune, not HIVTP", "divprune", "hivtp", 11.2),
    Pair("SCOPE, not HIVTP", "scope", "hivtp", 2.5),
    Pair("FastV, not HIVTP", "fastv", "hivtp", -1.1, INSIDE),
    Pair("DART, not HIVTP", "dart", "hivtp", None, INSIDE),
    Pair("SparseVLM, not HIVTP", "sparsevlm", "hivtp", None, INSIDE),
    Pair("PDrop, not HIVTP", "pdrop", "hivtp", None, INSIDE),
)


@dataclass(frozen=True)
class Field:
    """Where its data and results lie; tests make it small."""

    out: Path
    sizes: tuple[str, ...] = SIZES
    rows: str = "*"
    as_is: bool = False  # show what is there, of whatever code, and ask nothing

    def table(self, name: str) -> Table:
        table = load_table(CONFIGS / f"{name}.yaml")
        return load_table(CONFIGS / f"{name}.yaml", str(ROOT / table.model))

    def shelf(self, name: str, size: str) -> Shelf:
        """A table's results on the sets of a size."""
        return Shelf(self.table(name), self.out / f"results-{size}", stale=self.as_is)


def run_field(field: Field) -> tuple[str, str]:
    """Draw, ask and compare; whatever is done already is kept. Returns Markdown and CSV."""
    if not field.as_is:
        from eval.nano.datasets import write

        for size in field.sizes:
            data = write(field.out / size, size)
            for name in TABLES:
                _ask(field, name, size, data)
    found = {size: _scored(field, size) for size in field.sizes}
    found = {size: rows for size, rows in found.items() if "full" in rows}
    parts = [_head(field, found)]
    for size, rows in found.items():
        parts += [_asked(size, rows), _means(field, rows), _pairs(rows)]
    return "\n\n".join(parts), _csv(field, found)


def _ask(field: Field, name: str, size: str, data: Path) -> None:
    command = [sys.executable, "-m", "eval", "run", CONFIGS / f"{name}.yaml", "--rows", field.rows]
    command += ["--out", field.out / f"results-{size}", "--data", data, "--no-timing"]
    own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    own |= {"PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str((field.out / "cache").resolve())}
    log = field.out / "field.log"
    with log.open("ab") as file:
        words = [*map(str, command), "--batch", "16"]
        done = subprocess.run(words, env=os.environ | own, stdout=file, stderr=file)
    if done.returncode:
        raise RuntimeError(f"asking failed; see {log}, then run the same command again")


def _scored(field: Field, size: str) -> dict[str, Scored]:
    """Samples of all complete rows, those at kept positions as `kept:` and their id."""
    found = {}
    for name, prefix in zip(TABLES, ("", "kept:"), strict=True):
        shelf = field.shelf(name, size)
        each = {prefix + row.id: scored(shelf, row) for row in shelf.table.rows}
        found |= {row: groups for row, groups in each.items() if groups}
    return found


def _head(field: Field, found: Mapping[str, Mapping[str, Scored]]) -> str:
    commits = {
        str(result.provenance.get("commit", "unknown"))[:12]
        for size in found
        for name in TABLES
        for shelf in [field.shelf(name, size)]
        for unit in shelf.units
        if (result := shelf.result(unit))
    }
    return (
        f"python -m eval.nano field, asked at commit {', '.join(sorted(commits))}, on "
        f"{device_name()}, one thread\n\n"
        "Mean of the eight benchmarks on 0 to 100 with 95 % intervals; differences are paired by "
        "question; p-values by Holm within a table. The embedded model is a functional test: none "
        "of this is evidence about a method on a real LLaVA (eval/nano/README.md says why)."
    )


def _asked(size: str, rows: Mapping[str, Scored]) -> str:
    counts = [len(groups.answers) for groups in rows["full"].values()]
    full = mean(rows["full"])
    return (
        f"## Sets of size {size!r}\n\n{sum(counts)} questions in {len(counts)} sets of "
        f"{min(counts)} to {max(counts)}; unpruned {full}."
    )


def _means(field: Field, rows: Mapping[str, Scored]) -> str:
    """Every row of the table: its mean, its share of the unpruned one, its distance to HIVTP."""
    shown = [row for row in field.table("field").rows if row.id in rows and row.pruner != "none"]
    gaps = {}
    for row in shown:
        base = f"hivtp-{_count(row)}"
        if base in rows and row.id != base:
            gaps[row.id] = difference(rows[row.id], rows[base])
    corrected = dict(zip(gaps, stats.holm([gap.p_value for gap in gaps.values()]), strict=True))
    lines = [("tokens", "row", "mean", "% of unpruned", "minus HIVTP")]
    for row in shown:
        gap = gaps[row.id].said(corrected[row.id]) if row.id in gaps else ""
        share = relative(rows[row.id], rows["full"])
        lines.append((row.section, row.id, f"{mean(rows[row.id])}", f"{share or '-'}", gap))
    return pipes(lines, 2)


def _count(row: Row) -> str:
    return row.id.rpartition("-")[2]


def _pairs(rows: Mapping[str, Scored]) -> str:
    """PAIRS, count by count and over all counts, beside what the earlier study found."""
    asked = [(pair, *_differences(rows, pair)) for pair in PAIRS]
    asked = [(pair, each, pooled) for pair, each, pooled in asked if pooled]
    corrected = stats.holm([pooled.p_value for *_, pooled in asked])
    at = (*INSIDE, *COUNTS)
    lines = [("what", *(f"{n} %" for n in at), "all counts", "earlier", "")]
    for (pair, each, pooled), p_value in zip(asked, corrected, strict=True):
        cells = [f"{each[n].value:+.1f} ± {each[n].half:.1f}" if n in each else "" for n in at]
        earlier = "" if pair.earlier is None else f"{pair.earlier:+.1f}"
        verdict = _verdict(pair, pooled, p_value)
        lines.append((pair.said, *cells, pooled.said(p_value), earlier, verdict))
    return pipes(lines, 1)


def _verdict(pair: Pair, pooled: Difference, p_value: float) -> str:
    """Whether a difference has the earlier sign, if it is one."""
    if pair.earlier is None:
        return ""
    if p_value >= LEVEL:
        return "not shown"
    return "holds" if pooled.value * pair.earlier > 0 else "reversed"


def _differences(
    rows: Mapping[str, Scored], pair: Pair
) -> tuple[dict[int, Difference], Difference | None]:
    """By count, and of every question's mean over the counts."""
    both = {
        n: (rows[f"{pair.one}-{n}"], rows[f"{pair.other}-{n}"])
        for n in pair.counts
        if {f"{pair.one}-{n}", f"{pair.other}-{n}"} <= rows.keys()
    }
    if not both:
        return {}, None
    one, other = (_pooled(found) for found in zip(*both.values(), strict=True))
    return {n: difference(*found) for n, found in both.items()}, difference(one, other)


def _pooled(found: Sequence[Scored]) -> Scored:
    """Rows about the same questions as one, in which a question scores their mean."""
    return {
        task: replace(groups, y=np.mean([row[task].y for row in found], axis=0))
        for task, groups in found[0].items()
    }


def _csv(field: Field, found: Mapping[str, Mapping[str, Scored]]) -> str:
    """Every score, and the mean, of every row: size, row, tokens, benchmark, percent."""
    written = io.StringIO()
    writer = csv.writer(written, lineterminator="\n")
    writer.writerow(("size", "row", "section", "positions", "benchmark", "percent", "low", "high"))
    writer.writerows(_cells(field, found))
    return written.getvalue()


def _cells(field: Field, found: Mapping[str, Mapping[str, Scored]]) -> Iterator[tuple[str, ...]]:
    sections = {row.id: row.section for row in field.table("field").rows}
    for size, rows in found.items():
        for name, groups in rows.items():
            row = name.removeprefix("kept:")
            places = "packed" if name == row else "kept"
            each = {BENCHMARKS[task].column: {task: own} for task, own in groups.items()}
            for column, own in (each | {"mean": groups}).items():
                found_mean = mean(own)
                ends = found_mean.interval or ("", "")
                numbers = (f"{n:.2f}" if n != "" else "" for n in (found_mean.value, *ends))
                yield size, row, sections[row], places, column, *numbers
