"""Where `cover` loses against DivPrune and HIVTP, and what each keeps there."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes

from eval.machine import commit, device_name
from eval.nano import CHECKPOINTS
from eval.nano.ablation import PEERS, Ablated
from eval.nano.draw import PATCH
from eval.nano.exam import Item
from eval.nano.frontier import CHUNK, OURS, Model, build_rows, scored
from eval.nano.frontier_report import PARTS
from eval.nano.labels import GRID
from eval.report.picture import DPI, Picture
from eval.results.means import difference
from llava_hivtp.pruners import for_depth

PERCENTS = (11, 6)
SETS = tuple(name for sets in PARTS.values() for name in sets)
DRAWN = 3  # questions
WORST = 4  # sets of a tower and a budget in the table


def report(towers: Sequence[Ablated], picture: str) -> str:
    """The sets with the largest losses, what was kept of what was asked about, the picture."""
    lines = [
        f"{device_name()}, commit {commit()}. Points by which `{OURS}` leads, uncorrected, in the "
        f"{WORST} sets of each tower and budget where it is furthest behind. Kept: share of the "
        "patches a question is about that stay; seen: questions of which at least one such patch "
        "stays.",
    ]
    for peer in PEERS[::-1]:
        lines += ["", f"## Against {peer}", ""]
        lines.append(f"| tower | budget | set | {OURS} minus {peer} | kept | seen |")
        lines.append("|---|---:|---|---:|---:|---:|")
        for tower in towers:
            lines += _table(tower, peer)
    tower, percent, name = worst_of(towers)
    said = f"{name} on {tower.name} at {percent} %: DivPrune's answer is right, cover's is not"
    return "\n".join([*lines, "", f"![{said}]({picture})", ""])


def _table(tower: Ablated, peer: str) -> list[str]:
    lines = []
    for percent in PERCENTS:
        rows = [f"{name}-{percent}" for name in (OURS, peer)]
        for name in sorted(SETS, key=lambda name: _lead(tower, peer, percent, name)[0])[:WORST]:
            value, half = _lead(tower, peer, percent, name)
            shares = kept_of(tower.name, [i for i in tower.items if i.set == name], rows)
            kept = [f"{100 * each.mean():.0f}" for each in shares]
            seen = [f"{100 * (each > 0).mean():.0f}" for each in shares]
            lines.append(
                f"| {tower.name} | {percent} % | {name} | {value:+.1f} ± {half:.1f} | "
                f"{kept[0]} to {kept[1]} % | {seen[0]} to {seen[1]} % |"
            )
    return lines


def _lead(tower: Ablated, peer: str, percent: int, name: str) -> tuple[float, float]:
    rows = (f"{method}-{percent}" for method in (OURS, peer))
    found = difference(*(scored(tower.items, tower.right[row], (name,)) for row in rows))
    return found.value, found.half


def kept_of(tower: str, items: Sequence[Item], rows: Sequence[str]) -> np.ndarray:
    """(R, Q) share of the patches each question is about that each row keeps.

    Questions that are about nothing in the picture are left out.
    """
    model, every = Model(CHECKPOINTS / tower), build_rows()
    items = [item for item in items if item.patches().any()]
    methods = [for_depth(every[row], model.depth) for row in rows]
    shares: list[list[float]] = [[] for _ in rows]
    for start in range(0, len(items), CHUNK):
        some = items[start : start + CHUNK]
        seen = model.see([item.picture.image for item in some])
        for method, found in zip(methods, shares, strict=True):
            with torch.no_grad():
                kept = method.select(seen).split([1] * len(some))
            for item, each in zip(some, kept, strict=True):
                about = item.patches()
                found.append(about[each.patch.numpy()].sum() / about.sum())
    return np.array(shares)


def worst_of(towers: Sequence[Ablated]) -> tuple[Ablated, int, str]:
    """Tower, budget and set with the largest loss against DivPrune."""
    every = [(tower, percent, name) for tower in towers for percent in PERCENTS for name in SETS]
    return min(every, key=lambda one: _lead(one[0], "divprune", *one[1:])[0])


def draw_losses(towers: Sequence[Ablated], out: Path) -> Path:
    """Questions of the worst set: the picture, and what either method keeps of it."""
    tower, percent, name = worst_of(towers)
    rows = {method: f"{method}-{percent}" for method in (OURS, "divprune")}
    lost = [
        item
        for item, ours, theirs in zip(
            tower.items, *map(tower.right.get, rows.values()), strict=True
        )
        if item.set == name and theirs and not ours
    ]
    figure = Picture(figsize=(7.8, 2.9 * DRAWN), dpi=DPI, layout="constrained")
    panels = figure.subplots(DRAWN, 3, squeeze=False)
    model = Model(CHECKPOINTS / tower.name)
    methods = {m: for_depth(build_rows()[row], model.depth) for m, row in rows.items()}
    for line, item in zip(panels, lost, strict=False):
        seen = model.see([item.picture.image])
        asked = textwrap.fill(item.question.text, 34)
        _show(line[0], item, np.arange(GRID**2), f"{asked}\n{item.question.answer}")
        for panel, (method, pruner) in zip(line[1:], methods.items(), strict=True):
            with torch.no_grad():
                kept = pruner.select(seen).patch.numpy()
            _show(panel, item, kept, f"{method}, {len(kept)} tokens")
    for panel in panels.flat:
        panel.set_axis_off()
    figure.suptitle(f"{tower.name}, {name}, {percent} %: DivPrune answers right, cover does not")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    return out


def _show(panel: Axes, item: Item, kept: np.ndarray, title: str) -> None:
    """The picture with the patches that were not kept pale."""
    pixels = np.asarray(item.picture.image, float)
    stays = np.isin(np.arange(GRID**2), kept).reshape(GRID, GRID)
    stays = np.kron(stays, np.ones((PATCH, PATCH), bool))[..., None]
    pale = 0.25 * pixels.mean(2, keepdims=True) + 0.75 * 226
    panel.imshow(np.where(stays, pixels, pale).astype(np.uint8), interpolation="nearest")
    panel.set_title(title, fontsize=8)
