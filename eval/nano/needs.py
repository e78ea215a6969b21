"""Tokens that pictures take, against what they hold, as one picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eval.nano.ablation import FREE, Ablated, row_of, things_in
from eval.nano.frontier import BUDGETS, tokens_of
from eval.report.picture import DPI, Picture

FEW = 10  # pictures; a mean over fewer is not drawn


def draw_needs(towers: Sequence[Ablated], out: Path) -> Path:
    """A panel a tower: mean and quartiles of the tokens by the number of things drawn."""
    figure = Picture(figsize=(3.6 * len(towers), 3.4), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, len(towers), squeeze=False, sharey=True)[0]
    for panel, tower in zip(panels, towers, strict=True):
        for place, (percent, patches) in enumerate(BUDGETS.items()):
            counts = by_things(tower, percent)
            x = list(counts)
            low, high = np.array([np.percentile(each, (25, 75)) for each in counts.values()]).T
            color = f"C{place}"
            panel.plot(x, [np.mean(each) for each in counts.values()], color=color, marker=".")
            panel.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
            label = {"xytext": (3, 3), "textcoords": "offset points", "fontsize": 7}
            panel.axhline(patches, color=color, linestyle=":", linewidth=1)
            panel.annotate(f"mean {patches}", (x[-1], patches), color=color, **label)
        panel.set(title=tower.name, xlabel="shapes, boxes and characters drawn")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("tokens kept of 144")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    return out


def by_things(tower: Ablated, percent: int) -> dict[int, list[int]]:
    """Number of things -> tokens of every picture with so many; a picture counts once."""
    tokens = tower.right[tokens_of(row_of(FREE, percent))]
    pictures = {
        id(item.picture): (things_in(item), count)
        for item, count in zip(tower.items, tokens, strict=True)
    }
    found: dict[int, list[int]] = defaultdict(list)
    for things, count in pictures.values():
        found[things].append(count)
    return {things: each for things, each in sorted(found.items()) if len(each) >= FEW}
