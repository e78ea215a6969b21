"""What was measured, as rows of a CSV, as Markdown, and in plain words."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.efficiency.ideal import (
    Ceilings,
    Request,
    Stages,
    cache_bytes,
    gain_ends,
    request_seconds,
    stages,
)
from eval.efficiency.measure import Spread, ratios
from eval.efficiency.request import STAGES, Case, Run
from eval.efficiency.shapes import Shape, shape

if TYPE_CHECKING:
    from eval.plan.table import Table

UNTOUCHED = ("tower", "splice", "first")  # stages whose work does not depend on the tokens kept
NO_GAIN = 0.98  # a median TTFT ratio above it is no gain
LONGEST = 2048  # tokens of an answer: nobody asks LLaVA for more
TOLERANCE = 1.10  # measured over ideal: beyond it, something holds the gain back


@dataclass(frozen=True)
class Setting:
    """What all cases of a comparison share."""

    model: str
    shape: Shape
    dtype: str
    itemsize: int
    size: tuple[int, int]  # of the image, (width, height)
    text: int
    ceilings: Ceilings


@dataclass(frozen=True)
class Result:
    """One case of one setting, measured."""

    setting: Setting
    case: Case
    runs: tuple[Run, ...]
    request: Request
    peak: int  # bytes beyond the weights
    flops: int  # as torch counts them, up to the first token

    @property
    def image_tokens(self) -> int:
        """Positions an image takes in the language model, newlines included."""
        return self.request.length - self.setting.text

    @property
    def ttft(self) -> Spread:
        """Seconds to the first token."""
        return Spread.of(run.ttft for run in self.runs)

    @property
    def work(self) -> Stages:
        """Closed forms up to the first token."""
        return stages(self.setting.shape, self.request, self.setting.itemsize)

    def stage(self, name: str) -> Spread:
        """Seconds of one stage."""
        return Spread.of(run.stages[name] for run in self.runs)

    def throughput(self, new_tokens: int) -> Spread:
        """Tokens per second over a whole request of `new_tokens`."""
        batch = self.request.batch
        return Spread.of(run.throughput(new_tokens, batch) for run in self.runs)

    def ideal_seconds(self, new_tokens: int = 1) -> float:
        """Least time of a request of `new_tokens`, at the device's ceilings."""
        setting = self.setting
        return request_seconds(
            setting.shape, self.request, setting.itemsize, setting.ceilings, new_tokens
        )


@dataclass(frozen=True)
class Comparison:
    """A case against a base measured in the same rounds."""

    result: Result
    base: Result

    @property
    def ttft(self) -> Spread:
        """TTFT over the base's, paired round by round."""
        return ratios((r.ttft for r in self.result.runs), (r.ttft for r in self.base.runs))

    @property
    def ideal_ttft(self) -> float:
        """What physics allows."""
        return self.result.ideal_seconds() / self.base.ideal_seconds()

    def throughput(self, new_tokens: int) -> Spread:
        """Throughput over the base's."""
        batch = self.result.request.batch
        return ratios(
            (run.throughput(new_tokens, batch) for run in self.result.runs),
            (run.throughput(new_tokens, batch) for run in self.base.runs),
        )

    def ideal_throughput(self, new_tokens: int) -> float:
        """What physics allows."""
        return self.base.ideal_seconds(new_tokens) / self.result.ideal_seconds(new_tokens)

    @property
    def decode(self) -> Spread:
        """Tokens per second after the first, over the base's."""
        return ratios(
            (run.per_token() for run in self.base.runs),
            (run.per_token() for run in self.result.runs),
        )

    def ideal_decode(self, new_tokens: int) -> float:
        """What physics allows, for an answer of `new_tokens`."""
        ours, theirs = (
            result.ideal_seconds(new_tokens) - result.ideal_seconds()
            for result in (self.result, self.base)
        )
        return theirs / ours

    @property
    def select_share(self) -> Spread:
        """Score and selection over the base's TTFT."""
        return ratios(
            (run.stages["select"] for run in self.result.runs),
            (run.ttft for run in self.base.runs),
        )

    def verdict(self) -> str:
        """Aloud: does pruning gain, and if less than it could, which stage is to blame."""
        ttft, ideal = self.ttft, self.ideal_ttft
        said = f"{self.result.case.label}: TTFT {ttft.median:.2f} of {self.base.case.label}'s"
        if ttft.median > NO_GAIN:
            return f"PRUNING GAINS NOTHING. {said}. {self._blame()}"
        if ttft.high >= 1:
            return (
                f"{said}, but its quartiles reach from {ttft.low:.2f} to {ttft.high:.2f}: "
                "UNDECIDED, measure more rounds or on a quieter machine."
            )
        if ttft.median > TOLERANCE * ideal:
            return f"{said}, ideal {ideal:.2f}. {self._blame()}"
        return f"{said}, ideal {ideal:.2f}."

    def _blame(self) -> str:
        """The stage that costs most beyond its share of the work."""
        excess = {name: self._excess(name) for name in STAGES}
        worst = max(excess, key=excess.__getitem__)
        base_ttft = self.base.ttft.median
        if self.ideal_ttft > TOLERANCE**-1:
            share = sum(self.base.stage(name).median for name in UNTOUCHED) / base_ttft
            return (
                f"No more can be had: {share:.0%} of the base's time is tower, splice and choosing "
                f"a token, which no pruning shortens, and {self.result.image_tokens} of "
                f"{self.base.image_tokens} tokens stay."
            )
        if worst == "select":
            return (
                f"To blame: select, {1e3 * self.result.stage('select').median:.1f} ms, "
                f"{self.result.stage('select').median / base_ttft:.1%} of the base's TTFT."
            )
        ours, theirs = self.result.stage(worst).median, self.base.stage(worst).median
        return (
            f"To blame: {worst}, {1e3 * ours:.1f} ms against the base's {1e3 * theirs:.1f} ms, "
            f"where its work is {self._work_ratio(worst):.2f} of the base's."
        )

    def _excess(self, name: str) -> float:
        """Seconds a stage takes beyond the base's time scaled by its work."""
        ours, theirs = self.result.stage(name).median, self.base.stage(name).median
        return ours - theirs * self._work_ratio(name)

    def _work_ratio(self, name: str) -> float:
        if name not in ("tower", "project", "prefill"):
            return 1.0
        ceilings = self.result.setting.ceilings
        ours, theirs = (getattr(result.work, name) for result in (self.result, self.base))
        return ours.seconds(ceilings) / theirs.seconds(ceilings)


def differences(results: Sequence[Result], of: str = "hivtp") -> list[str]:
    """HIVTP's TTFT against every other method of its block; called where quartiles are apart."""
    said = []
    for ours in results:
        if ours.case.pruner is None or type(ours.case.pruner).__name__.lower() != of:
            continue
        rivals = [
            other
            for other in results
            if other.case.block == ours.case.block
            and other.case.layout == ours.case.layout
            and other is not ours
            and other.case.pruner is not None
        ]
        for other in rivals:
            ratio = Comparison(ours, other).ttft
            word = "no difference"
            if ours.ttft.apart(other.ttft):
                word = "earlier" if ours.ttft.median < other.ttft.median else "later"
            said.append(
                f"{ours.case.label} against {other.case.label}: {word} (TTFT "
                f"{ratio.median:.3f}, quartiles {ratio.low:.3f} to {ratio.high:.3f})"
            )
    return said


def rows(
    results: Sequence[Result], new_tokens: Sequence[int], machine: dict[str, str]
) -> list[dict[str, Any]]:
    """One flat row per case, everything inside: numbers, ratios, machine, versions."""
    stock = next(result for result in results if result.case.pruner is None)
    table = []
    for result in results:
        setting = result.setting
        against = {"stock": Comparison(result, stock)}
        if result.case.pruner is not None:
            against["none"] = Comparison(result, unpruned(results, result.case.layout))
        row: dict[str, Any] = {
            "model": setting.model,
            "lm_layers": setting.shape.layers,
            "dtype": setting.dtype,
            "image": "x".join(map(str, setting.size)),
            "batch": result.request.batch,
            "tiles": result.request.tiles,
            "text_tokens": setting.text,
            "case": result.case.name,
            "layout": result.case.layout,
            "r_max_pct": result.case.block,
            "image_tokens": result.image_tokens,
            "rounds": len(result.runs),
        }
        for name in STAGES:
            row |= _spread(f"{name}_ms", result.stage(name), 1e3)
        row |= _spread("ttft_ms", result.ttft, 1e3)
        if max(new_tokens) > 1:
            row |= _spread("per_token_ms", Spread.of(r.per_token() for r in result.runs), 1e3)
            row |= _spread("decode_vs_stock", against["stock"].decode)
            ideal = against["stock"].ideal_decode(max(new_tokens))
            row["ideal_decode_vs_stock"] = f"{ideal:.4f}"
        for name, comparison in against.items():
            row |= _spread(f"ttft_vs_{name}", comparison.ttft)
            row[f"ideal_ttft_vs_{name}"] = f"{comparison.ideal_ttft:.4f}"
        row |= _spread("select_vs_stock_ttft", against["stock"].select_share)
        for n in new_tokens:
            row |= _spread(f"throughput_{n}", result.throughput(n))
            row |= _spread(f"throughput_{n}_vs_stock", against["stock"].throughput(n))
            ideal = against["stock"].ideal_throughput(n)
            row[f"ideal_throughput_{n}_vs_stock"] = f"{ideal:.4f}"
        row["peak_bytes"] = result.peak
        row["cache_bytes"] = cache_bytes(setting.shape, result.request, setting.itemsize)
        row["gflops_counted"] = f"{result.flops / 1e9:.3f}"
        row["gflops_closed"] = f"{result.work.flops / 1e9:.3f}"
        row["ceiling_gflops"] = f"{setting.ceilings.flops / 1e9:.1f}"
        row["ceiling_gbytes"] = f"{setting.ceilings.bytes / 1e9:.1f}"
        table.append(row | machine)
    return table


def unpruned(results: Iterable[Result], layout: str) -> Result:
    """The case `none` of a layout: everything kept, through our own path."""
    return next(r for r in results if r.case.name == "none" and r.case.layout == layout)


def write_csv(path: Path, table: Sequence[dict[str, Any]]) -> None:
    """All rows under one header; a cell that does not apply stays empty."""
    names = list(dict.fromkeys(name for row in table for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(table)


def markdown(
    results: Sequence[Result],
    new_tokens: Sequence[int],
    machine: dict[str, str],
    table: Table | None = None,
) -> str:
    """One setting: times and ratios, stages, throughput, memory and arithmetic, verdicts."""
    setting = results[0].setting
    stock = next(result for result in results if result.case.pruner is None)
    comparisons = [Comparison(result, stock) for result in results]
    first = results[0].request
    lines = [
        f"## {setting.model}, {setting.size[0]}x{setting.size[1]}, batch {first.batch}",
        "",
        f"{setting.shape.layers} language-model layers, {setting.dtype}, {first.tiles} tiles per "
        f"image, {setting.text} text tokens, {len(results[0].runs)} interleaved rounds. "
        + "; ".join(f"{name} {value}" for name, value in machine.items() if value),
        "",
        "Medians with quartiles. Ratios are paired round by round. Ideal: the least time at "
        f"{setting.ceilings.flops / 1e9:.0f} GFLOP/s and {setting.ceilings.bytes / 1e9:.0f} GB/s, "
        "both measured here; choosing tokens is free in it. Select holds score and selection; "
        "tapping queries and keys is part of tower, and `python -m eval tap` times it apart.",
        "",
    ]
    lines += _times(comparisons, results)
    lines += _stages(results)
    lines += _throughputs(comparisons, new_tokens)
    lines += _memory(results)
    pruned = [c for c in comparisons if c.result.case.block < 100]
    lines += [f"- {comparison.verdict()}" for comparison in pruned]
    lines += [f"- {sentence}" for sentence in differences(results)]
    lines += [
        f"- The paper's {row.id} on {table.device}: TTFT {row.ttft:.3f} of its unpruned model's, "
        f"throughput {row.throughput:.3f}"
        for row in printed_ratios(table)
    ]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Printed:
    """A row of the paper over its unpruned row."""

    id: str
    tokens: float
    ttft: float
    throughput: float


def printed_ratios(table: Table | None) -> list[Printed]:
    """HIVTP's printed rows, where the table prints times."""
    columns = ("tokens", "ttft_ms", "throughput")
    base = table.unpruned if table else None
    if base is None or not set(columns) <= base.printed.keys():
        return []
    return [
        Printed(row.id, *(float(row.printed[name] / base.printed[name]) for name in columns))
        for row in table.rows
        if row.pruner == "hivtp" and set(columns) <= row.printed.keys()
    ]


def measured_ceilings(path: Path) -> tuple[Ceilings, int]:
    """What the machine of a results file reached, and the bytes of a number there."""
    with path.open() as file:
        row = next(csv.DictReader(file))
    limits = Ceilings(1e9 * float(row["ceiling_gflops"]), 1e9 * float(row["ceiling_gbytes"]))
    return limits, 4 if row["dtype"] == "float32" else 2


def expected(
    names: Iterable[str],
    batches: Iterable[int],
    new_tokens: Sequence[int],
    text: int,
    limits: Ceilings,
    itemsize: int = 2,
    keep: float = 0.25,
) -> str:
    """Closed forms alone: what keeping a share of the tokens can gain, and where the gain ends."""
    ridge = itemsize * limits.flops / (2 * limits.bytes)
    heads = ["model", "image tokens", "batch", "TTFT", *(f"{n} new" for n in new_tokens)]
    lines = [
        f"Least times in {8 * itemsize} bits at {limits.flops / 1e12:.3g} TFLOP/s and "
        f"{limits.bytes / 1e9:.0f} GB/s, {text} text tokens: TTFT over the unpruned one's, "
        "throughput over the unpruned one's by answer length, and the longest answer whose "
        "throughput still gains a tenth. Where batch times prompt is below "
        f"{ridge:.0f} tokens, prefill waits for the weights and pruning further gains no time.",
        "",
        _line([*heads, "gains 1.1 up to"]),
        "|---" + "|--:" * len(heads) + "|",
    ]
    for name in names:
        model = shape(name)
        tiles = 5 if model.anyres else 1
        every = tiles * model.tower.patches
        kept = int(every * keep)
        for batch in batches:
            full = Request(batch, tiles, model.tower.layers, every, every + text)
            pruned = Request(batch, tiles, model.tower.layers - 1, kept, kept + text)
            ours, theirs = (
                [request_seconds(model, request, itemsize, limits, n) for n in (1, *new_tokens)]
                for request in (pruned, full)
            )
            gains = [f"{b / a:.2f}" for a, b in zip(ours[1:], theirs[1:], strict=True)]
            ends = gain_ends(model, full, pruned, itemsize, limits, most=LONGEST)
            cells = [name, f"{every} to {kept}", str(batch), f"{ours[0] / theirs[0]:.2f}"]
            lines.append(_line([*cells, *gains, f"{ends} tokens" if ends < LONGEST else "all"]))
    return "\n".join(lines) + "\n"


def _times(comparisons: Sequence[Comparison], results: Sequence[Result]) -> list[str]:
    lines = [
        "| case | image tokens | TTFT ms | / stock | ideal | / none | ideal | select / stock |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for comparison in comparisons:
        result, none = comparison.result, ["", ""]
        if result.case.pruner is not None:
            own = Comparison(result, unpruned(results, result.case.layout))
            none = [_show(own.ttft, 1, 3), f"{own.ideal_ttft:.3f}"]
        cells = [
            result.case.label,
            str(result.image_tokens),
            _show(result.ttft, 1e3, 1),
            _show(comparison.ttft, 1, 3),
            f"{comparison.ideal_ttft:.3f}",
            *none,
            _show(comparison.select_share, 100, 2) + " %",
        ]
        lines.append(_line(cells))
    return [*lines, ""]


def _stages(results: Sequence[Result]) -> list[str]:
    lines = [_line(["stage, ms", *STAGES]), "|---" + "|--:" * len(STAGES) + "|"]
    for result in results:
        cells = [_show(result.stage(name), 1e3, 1) for name in STAGES]
        lines.append(_line([result.case.label, *cells]))
    return [*lines, ""]


def _throughputs(comparisons: Sequence[Comparison], new_tokens: Sequence[int]) -> list[str]:
    heads = [f"{n} new: / stock (ideal)" for n in new_tokens]
    several = max(new_tokens) > 1
    decode = ["ms per token", "decoding / stock (ideal)"] if several else []
    titles = ["throughput", *decode, *heads]
    lines = [_line(titles), "|---" + "|--:" * (len(titles) - 1) + "|"]
    for comparison in comparisons:
        cells = [comparison.result.case.label]
        if several:
            cells.append(_show(Spread.of(r.per_token() for r in comparison.result.runs), 1e3, 2))
            ideal = comparison.ideal_decode(max(new_tokens))
            cells.append(f"{_show(comparison.decode, 1, 3)} ({ideal:.3f})")
        for n in new_tokens:
            ideal = comparison.ideal_throughput(n)
            cells.append(f"{_show(comparison.throughput(n), 1, 3)} ({ideal:.3f})")
        lines.append(_line(cells))
    return [*lines, ""]


def _memory(results: Sequence[Result]) -> list[str]:
    lines = [
        "| memory and arithmetic | peak MB beyond weights | KV cache MB | GFLOP counted | closed |",
        "|---|--:|--:|--:|--:|",
    ]
    for result in results:
        setting = result.setting
        cache = cache_bytes(setting.shape, result.request, setting.itemsize)
        cells = [
            result.case.label,
            f"{result.peak / 1e6:.1f}",
            f"{cache / 1e6:.1f}",
            f"{result.flops / 1e9:.1f}",
            f"{result.work.flops / 1e9:.1f}",
        ]
        lines.append(_line(cells))
    return [*lines, ""]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _show(spread: Spread, scale: float, digits: int) -> str:
    median, low, high = (scale * value for value in (spread.median, spread.low, spread.high))
    return f"{median:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def _spread(name: str, spread: Spread, scale: float = 1.0) -> dict[str, str]:
    return {
        name: f"{scale * spread.median:.4f}",
        f"{name}_q1": f"{scale * spread.low:.4f}",
        f"{name}_q3": f"{scale * spread.high:.4f}",
    }
