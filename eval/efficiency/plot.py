"""TTFT and throughput against the share of image tokens kept, ours beside the paper's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eval.efficiency.comparison import Comparison, Result, stock_of
from eval.efficiency.printed import printed_ratios
from eval.plan.table import Table

OURS, IDEAL, PAPER = "#0b5fa5", "#0b5fa5", "#b0532a"


def draw(
    path: Path, results: Sequence[Result], new_tokens: int, table: Table | None = None
) -> None:
    """Ratios to stock LLaVA; the paper's points are ratios of its own printed cells."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    stock = stock_of(results)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, title in ((left, "TTFT"), (right, f"throughput, {new_tokens} new tokens")):
        axis.set_title(f"{title}, ratio to stock LLaVA", fontsize=10)
        axis.set_xlabel("image tokens kept, share of stock")
        axis.axhline(1, color="0.8", linewidth=0.8, zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
    for result in results:
        if result.case.pruner is None:
            continue
        comparison = Comparison(result, stock)
        share = result.image_tokens / stock.image_tokens
        hivtp = result.case.is_hivtp
        color = OURS if hivtp else "0.6"
        for axis, spread, ideal in (
            (left, comparison.ttft, comparison.ideal_ttft),
            (right, comparison.throughput(new_tokens), comparison.ideal_throughput(new_tokens)),
        ):
            bars = [[spread.median - spread.low], [spread.high - spread.median]]
            point = {"fmt": "o", "color": color, "markersize": 4, "zorder": 3 if hivtp else 2}
            axis.errorbar(share, spread.median, yerr=bars, **point)  # HIVTP's lie on top
            if hivtp:
                axis.plot(share, ideal, "_", color=IDEAL, markersize=12)
    for printed in printed_ratios(table):
        left.plot(printed.tokens, printed.ttft, "x", color=PAPER, markersize=6)
        right.plot(printed.tokens, printed.throughput, "x", color=PAPER, markersize=6)
    left.plot([], [], "o", color=OURS, label="HIVTP, measured")
    left.plot([], [], "_", color=IDEAL, label="HIVTP, ideal")
    left.plot([], [], "o", color="0.6", label="others, measured")
    if printed_ratios(table):
        left.plot([], [], "x", color=PAPER, label=f"HIVTP in the paper, {table.device}")
    left.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
    plt.close(figure)
