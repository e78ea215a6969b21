"""Accuracy against cost, from stored results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes

from eval.plan.names import display_name
from eval.plan.table import load_table, select_rows
from eval.report.picture import DPI, Picture, save
from eval.results.collect import Collected, collect
from eval.results.stats import Interval

COSTS = {"tokens": "kept patch tokens", "ttft_ms": "time to first token (ms)"}
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vP*X<>ph8"


@dataclass(frozen=True)
class Point:
    """One row of a table; intervals are of 95 %, None where none is known."""

    method: str
    cost: float
    accuracy: float  # percent of the unpruned model's, mean over the benchmarks
    cost_interval: Interval | None = None
    accuracy_interval: Interval | None = None  # of the ratio, questions paired


def make_pareto(config: Path, results: Path, model: str | None, out: Path) -> None:
    """Draw the stored results of a table into the folder `out`.

    Raises:
        ValueError: if too few rows are complete.
    """
    table = load_table(config, model)
    figure = draw_pareto(collect(table, select_rows(table), results))
    if figure is None:
        raise ValueError(f"{results} holds too few finished rows of {config}: run them first")
    stem = out / f"pareto-{config.stem}"
    save(figure, stem)
    print(f"{stem}.png, .pdf: accuracy against kept tokens and TTFT")


def points(collected: Collected, cost: str) -> list[Point]:
    """Every row with all its benchmarks and this cost; incomplete rows are left out."""
    return [
        Point(
            measured.row.name or display_name(measured.row.pruner),
            measured.values[cost],
            measured.values["relative"],
            measured.intervals.get(cost),
            measured.intervals.get("relative"),
        )
        for measured in collected.rows
        if {cost, "relative"} <= measured.values.keys() and cost not in measured.partial
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
    if any(p.accuracy_interval or p.cost_interval for found in panels.values() for p in found):
        axes[0].set_title("bars: 95 % intervals", fontsize=8, loc="left")
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
        color = COLORS[place % len(COLORS)]
        for point in line:
            _bars(axes, point, color)
        axes.plot(
            [p.cost for p in line],
            [p.accuracy for p in line],
            color=color,
            marker=MARKERS[place % len(MARKERS)],
            markersize=6,
            linewidth=1.2,
            linestyle="-" if place < len(COLORS) else "--",
            label=method,
        )
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)


def _bars(axes: Axes, point: Point, color: str) -> None:
    axes.errorbar(
        point.cost,
        point.accuracy,
        xerr=_arms(point.cost, point.cost_interval),
        yerr=_arms(point.accuracy, point.accuracy_interval),
        fmt="none",
        ecolor=color,
        elinewidth=0.8,
        capsize=2,
        alpha=0.6,
    )


def _arms(value: float, interval: Interval | None) -> list[list[float]] | None:
    return [[value - interval[0]], [interval[1] - value]] if interval else None
