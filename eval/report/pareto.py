"""Accuracy against cost, from stored results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from eval.benchmarks.records import BENCHMARKS
from eval.figures.draw import DPI, Picture
from eval.report.table import METHODS
from eval.results.collect import Collected, Measured

COSTS = {"tokens": "kept patch tokens", "ttft_ms": "time to first token (ms)"}
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vP*X<>ph8"


@dataclass(frozen=True)
class Point:
    """One row of a table."""

    method: str
    cost: float
    accuracy: float  # percent of the unpruned model's, mean over the benchmarks


def points(collected: Collected, cost: str) -> list[Point]:
    """Every row with all its benchmarks and this cost; incomplete rows are left out."""
    columns = [BENCHMARKS[task].column for task in collected.table.tasks]
    full = next((m for m in collected.rows if m.row.pruner == "none"), None)
    if full is None or not all(full.values.get(column) for column in columns):
        return []
    return [
        Point(
            METHODS.get(measured.row.pruner, measured.row.pruner),
            measured.values[cost],
            100 * sum(measured.values[c] / full.values[c] for c in columns) / len(columns),
        )
        for measured in collected.rows
        if _complete(measured, [*columns, cost])
    ]


def frontier(found: Sequence[Point]) -> list[Point]:
    """Points that no other one beats, cheapest first: nothing as cheap is more accurate."""
    front: list[Point] = []
    for point in sorted(found, key=lambda p: (p.cost, -p.accuracy)):
        if not front or point.accuracy > front[-1].accuracy:
            front.append(point)
    return front


def draw_pareto(collected: Collected) -> Picture | None:
    """Accuracy against kept tokens and against TTFT; None while no row is complete."""
    panels = {cost: points(collected, cost) for cost in COSTS}
    panels = {cost: found for cost, found in panels.items() if len(found) > 1}
    if not panels:
        return None
    figure = Picture(figsize=(4.3 * len(panels) + 1.8, 3.9), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    methods = list(dict.fromkeys(p.method for found in panels.values() for p in found))
    for panel, (cost, found) in zip(axes, panels.items(), strict=True):
        _plot(panel, found, methods)
        panel.set_xlabel(COSTS[cost], fontsize=9)
    axes[0].set_ylabel("score, % of the unpruned model's\n(mean over the benchmarks)", fontsize=9)
    if "ttft_ms" in panels and collected.timing_device:
        axes[-1].set_title(f"times from: {collected.timing_device}", fontsize=8, loc="right")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _plot(axes: Axes, found: Sequence[Point], methods: Sequence[str]) -> None:
    front = frontier(found)
    axes.step(
        [p.cost for p in front],
        [p.accuracy for p in front],
        where="post",
        color="0.75",
        linewidth=5,
        solid_capstyle="round",
        label="Pareto frontier",
        zorder=1,
    )
    for place, method in enumerate(methods):
        line = sorted((p for p in found if p.method == method), key=lambda p: p.cost)
        axes.plot(
            [p.cost for p in line],
            [p.accuracy for p in line],
            color=COLORS[place % len(COLORS)],
            marker=MARKERS[place % len(MARKERS)],
            markersize=6,
            linewidth=1.2,
            linestyle="-" if place < len(COLORS) else "--",
            label=method,
        )
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)


def _complete(measured: Measured, columns: Sequence[str]) -> bool:
    return all(measured.values.get(c) is not None and c not in measured.partial for c in columns)
