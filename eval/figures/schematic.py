"""The method in one picture, computed on a score map of our own."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle

from eval.figures.draw import add_marks, paint
from eval.figures.look import DROPPED, GLOBAL, LOCAL
from eval.report.picture import DPI, GREEN, RED, Picture
from llava_hivtp.pruners import HIVTP

N, R, K, C = 12, 2, 25, 2  # a 12 x 12 grid under the settings of the paper's 50 % row
SIDE, GAP, BOX = 1.9, 0.5, 1.35  # inches: a grid, the space for an arrow, a box
HEIGHT, BOTTOM, MIDDLE, APART = 3.25, 0.92, 1.87, 0.5


def draw_schematic() -> Picture:
    """HIVTP from the vision encoder to the language model."""
    scores = _scores()
    stages = _stages(scores)
    kept, total = int((stages > DROPPED).sum()), stages.size
    width = 2 * BOX + 4 * SIDE + 5 * GAP + 0.4
    figure = Picture(figsize=(width, HEIGHT), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, HEIGHT))
    axes.axis("off")
    first, second = (np.where(stages == stage, stage, DROPPED) for stage in (GLOBAL, LOCAL))
    x = 0.2
    _boxes(axes, x, ("image", "vision\nencoder"), "attention of the\nmiddle layers")
    x += BOX + GAP
    steps = (
        (scores, "1  Importance", "attention each patch receives,\nmean over layers, heads, rows"),
        (
            paint(_gradient(), first),
            "2  Global stage",
            f"the best {K} % of each\nof {R} x {R} regions",
        ),
        (
            paint(_gradient(), second),
            "3  Local stage",
            f"the best leftover of\neach {C} x {C} window",
        ),
        (paint(_gradient(), stages), "4  Union", f"{kept} of {total} patches,\nin reading order"),
    )
    for picture, title, words in steps:
        _grid(axes, x, picture, title, words)
        _arrow(axes, x - GAP, MIDDLE - APART if picture is scores else MIDDLE)
        x += SIDE + GAP
    _cuts(axes, 0.2 + BOX + 2 * GAP + SIDE, N // R, GREEN)
    _cuts(axes, 0.2 + BOX + 3 * GAP + 2 * SIDE, C, RED)
    _arrow(axes, x - GAP, MIDDLE + APART)
    _boxes(axes, x, ("projector", "language\nmodel"), "reads the\nkept tokens only")
    add_marks(figure, {GLOBAL: "global stage", LOCAL: "local stage", DROPPED: "dropped"})
    return figure


def _scores() -> np.ndarray:
    """Two objects on a grainy background."""
    y, x = np.mgrid[:N, :N]
    blobs = np.exp(-((x - 3) ** 2 + (y - 4) ** 2) / 6) + np.exp(
        -((x - 8.5) ** 2 + (y - 7) ** 2) / 9
    )
    return blobs + 0.35 * np.random.default_rng(0).random((N, N))


def _stages(scores: np.ndarray) -> np.ndarray:
    flat = torch.from_numpy(scores.reshape(1, -1))
    return HIVTP(r=R, k=K, c=C, layers=(1,)).stages(flat).numpy().reshape(N, N)


def _gradient() -> np.ndarray:
    """A plain picture to draw on."""
    rows = np.linspace(215, 150, 48).astype(np.uint8)
    return np.broadcast_to(rows[:, None, None], (48, 48, 3)).copy()


def _grid(axes: Axes, x: float, picture: np.ndarray, title: str, words: str) -> None:
    extent = (x, x + SIDE, BOTTOM, BOTTOM + SIDE)
    axes.imshow(picture, extent=extent, cmap="cividis", interpolation="nearest", aspect="auto")
    axes.add_patch(Rectangle((x, BOTTOM), SIDE, SIDE, fill=False, linewidth=1))
    axes.text(x, BOTTOM + SIDE + 0.12, title, fontsize=11, weight="bold")
    axes.text(x + SIDE / 2, BOTTOM - 0.08, words, fontsize=9, va="top", ha="center")


def _cuts(axes: Axes, x: float, step: int, color: tuple[int, int, int]) -> None:
    """Borders of regions or windows over a grid."""
    places = np.arange(step, N, step) * SIDE / N
    line = {"color": np.array(color) / 255, "linewidth": 2.2 if step > C else 1, "linestyle": "--"}
    axes.hlines(BOTTOM + places, x, x + SIDE, **line)
    axes.vlines(x + places, BOTTOM, BOTTOM + SIDE, **line)


def _boxes(axes: Axes, x: float, names: tuple[str, str], words: str) -> None:
    """Two boxes, the upper feeding the lower."""
    half = 0.34
    for name, y in zip(names, (MIDDLE + APART, MIDDLE - APART), strict=True):
        box = FancyBboxPatch(
            (x + 0.05, y - half),
            BOX - 0.1,
            2 * half,
            boxstyle="round,pad=0,rounding_size=0.1",
            facecolor="0.93",
            edgecolor="0.3",
        )
        axes.add_patch(box)
        axes.text(x + BOX / 2, y, name, fontsize=10, ha="center", va="center")
    middle = x + BOX / 2
    _point(axes, (middle, MIDDLE + APART - half), (middle, MIDDLE - APART + half))
    axes.text(middle, BOTTOM - 0.08, words, fontsize=9, va="top", ha="center")


def _arrow(axes: Axes, x: float, y: float) -> None:
    _point(axes, (x + 0.04, y), (x + GAP - 0.04, y))


def _point(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    style = {"arrowstyle": "-|>", "color": "0.2", "shrinkA": 0, "shrinkB": 0, "linewidth": 1.5}
    axes.annotate("", end, start, arrowprops=style)
