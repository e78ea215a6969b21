"""What was measured: rows of a CSV, Markdown, plain words."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.clock import Spread
from eval.efficiency.comparison import Comparison, Result, differences, stock_of, unpruned
from eval.efficiency.ideal import cache_bytes
from eval.efficiency.printed import printed_ratios
from eval.efficiency.stopwatch import STAGES
from eval.markdown import pipes
from eval.plan.table import Table


def rows(
    results: Sequence[Result], new_tokens: Sequence[int], machine: dict[str, str]
) -> list[dict[str, Any]]:
    """One flat row per case, everything inside: numbers, ratios, machine, versions."""
    return [
        _what(result) | _seconds(result, results, new_tokens) | _work(result) | machine
        for result in results
    ]


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
    comparisons = [Comparison(result, stock_of(results)) for result in results]
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
        "tapping queries and keys is part of tower, and `python -m eval tap` times it apart. "
        "Image tokens are those of the mean layer of the language model.",
    ]
    tables = [
        _times(comparisons, results),
        _stages(results),
        _throughputs(comparisons, new_tokens),
        _memory(results),
    ]
    for shown in tables:
        lines += ["", pipes(shown, left=1)]
    said = [f"WARNING: {warning}." for warning in setting.warnings]
    said += [each.verdict() for each in comparisons if each.result.case.block < 100]
    said += differences(results)
    said += [
        f"The paper's {row.id} on {table.device}: TTFT {row.ttft:.3f} of its unpruned model's, "
        f"throughput {row.throughput:.3f}"
        for row in printed_ratios(table)
    ]
    return "\n".join([*lines, "", *(f"- {sentence}" for sentence in said)]) + "\n"


def _what(result: Result) -> dict[str, Any]:
    setting = result.setting
    return {
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
        "image_tokens": f"{result.image_tokens:g}",
        "rounds": len(result.runs),
        "worked_share": f"{setting.worked_share:.3f}",
        "warnings": "; ".join(setting.warnings),
    }


def _seconds(
    result: Result, results: Sequence[Result], new_tokens: Sequence[int]
) -> dict[str, str]:
    """Stages, TTFT, throughput, and their ratios to stock LLaVA and to nothing pruned."""
    stock = Comparison(result, stock_of(results))
    row: dict[str, str] = {}
    for name in STAGES:
        row |= _spread(f"{name}_ms", result.stage(name), 1e3)
    row |= _spread("ttft_ms", result.ttft, 1e3)
    if max(new_tokens) > 1:
        row |= _spread("per_token_ms", Spread.of(r.per_token() for r in result.runs), 1e3)
        row |= _spread("decode_vs_stock", stock.decode)
        row["ideal_decode_vs_stock"] = f"{stock.ideal_decode(max(new_tokens)):.4f}"
    against = {"stock": stock}
    if result.case.pruner is not None:
        against["none"] = Comparison(result, unpruned(results, result.case.layout))
    for name, comparison in against.items():
        row |= _spread(f"ttft_vs_{name}", comparison.ttft)
        row[f"ideal_ttft_vs_{name}"] = f"{comparison.ideal_ttft:.4f}"
    row |= _spread("select_vs_stock_ttft", stock.select_share)
    for n in new_tokens:
        row |= _spread(f"throughput_{n}", result.throughput(n))
        row |= _spread(f"throughput_{n}_vs_stock", stock.throughput(n))
        row[f"ideal_throughput_{n}_vs_stock"] = f"{stock.ideal_throughput(n):.4f}"
    return row


def _work(result: Result) -> dict[str, Any]:
    setting = result.setting
    return {
        "peak_bytes": result.peak,
        "cache_bytes": cache_bytes(setting.shape, result.request, setting.itemsize),
        "gflops_counted": f"{result.flops / 1e9:.3f}",
        "gflops_closed": f"{result.work.flops / 1e9:.3f}",
        "ceiling_gflops": f"{setting.ceilings.flops / 1e9:.1f}",
        "ceiling_gbytes": f"{setting.ceilings.bytes / 1e9:.1f}",
    }


def _times(comparisons: Sequence[Comparison], results: Sequence[Result]) -> list[list[str]]:
    heads = [
        "case",
        "image tokens",
        "TTFT ms",
        "/ stock",
        "ideal",
        "/ none",
        "ideal",
        "select / stock",
    ]
    lines = [heads]
    for comparison in comparisons:
        result, none = comparison.result, ["", ""]
        if result.case.pruner is not None:
            own = Comparison(result, unpruned(results, result.case.layout))
            none = [show(own.ttft, 1, 3), f"{own.ideal_ttft:.3f}"]
        cells = [
            result.case.label,
            f"{result.image_tokens:g}",
            show(result.ttft, 1e3, 1),
            show(comparison.ttft, 1, 3),
            f"{comparison.ideal_ttft:.3f}",
            *none,
            show(comparison.select_share, 100, 2) + " %",
        ]
        lines.append(cells)
    return lines


def _stages(results: Sequence[Result]) -> list[list[str]]:
    lines = [["stage, ms", *STAGES]]
    for result in results:
        lines.append([result.case.label, *(show(result.stage(name), 1e3, 1) for name in STAGES)])
    return lines


def _throughputs(comparisons: Sequence[Comparison], new_tokens: Sequence[int]) -> list[list[str]]:
    heads = [f"{n} new: / stock (ideal)" for n in new_tokens]
    several = max(new_tokens) > 1
    decode = ["ms per token", "decoding / stock (ideal)"] if several else []
    lines = [["throughput", *decode, *heads]]
    for comparison in comparisons:
        cells = [comparison.result.case.label]
        if several:
            cells.append(show(Spread.of(r.per_token() for r in comparison.result.runs), 1e3, 2))
            ideal = comparison.ideal_decode(max(new_tokens))
            cells.append(f"{show(comparison.decode, 1, 3)} ({ideal:.3f})")
        for n in new_tokens:
            ideal = comparison.ideal_throughput(n)
            cells.append(f"{show(comparison.throughput(n), 1, 3)} ({ideal:.3f})")
        lines.append(cells)
    return lines


def _memory(results: Sequence[Result]) -> list[list[str]]:
    lines = [
        [
            "memory and arithmetic",
            "peak MB beyond weights",
            "KV cache MB",
            "GFLOP counted",
            "closed",
        ]
    ]
    for result in results:
        work = _work(result)
        cells = [
            result.case.label,
            f"{work['peak_bytes'] / 1e6:.1f}",
            f"{work['cache_bytes'] / 1e6:.1f}",
            f"{result.flops / 1e9:.1f}",
            f"{result.work.flops / 1e9:.1f}",
        ]
        lines.append(cells)
    return lines


def show(spread: Spread, scale: float, digits: int) -> str:
    """A median with its quartiles."""
    median, low, high = (scale * value for value in (spread.median, spread.low, spread.high))
    return f"{median:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def _spread(name: str, spread: Spread, scale: float = 1.0) -> dict[str, str]:
    return {
        name: f"{scale * spread.median:.4f}",
        f"{name}_q1": f"{scale * spread.low:.4f}",
        f"{name}_q3": f"{scale * spread.high:.4f}",
    }
