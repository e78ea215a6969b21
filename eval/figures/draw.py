"""Draw kept tokens on the image they come from.

In a notebook, after any call of the model:

    from eval.figures.draw import draw_kept
    draw_kept(image, model.kept[0], model)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnchoredOffsetbox, HPacker, OffsetImage, TextArea
from matplotlib.patches import Rectangle
from PIL import Image

from eval.figures.look import CENTRE, CROPPED, DROPPED, KEPT, Look, Sheet, chosen, look
from eval.figures.square import Square, widest_square
from eval.report.picture import BLUE, DPI, GREEN, PURPLE, RED, YELLOW, Picture
from llava_hivtp.anyres import PackedImage
from llava_hivtp.pruners import Pruner
from llava_hivtp.vision import KeptTokens

PAPER = 226  # dropped patches fade towards this grey
SQUARE = "widest empty square"


def draw_kept(
    image: Image.Image, kept: PackedImage | KeptTokens, model: Any, *, square: bool = True
) -> Picture:
    """Draw one image with its kept tokens in colour and the dropped ones pale.

    The image is shown as the vision tower sees it: squared, cropped, or cut into AnyRes tiles.
    The stages of a method that has them (HIVTP: global green, local red with a corner) are told
    apart while `model.pruner` is the one that chose `kept`; all other kept tokens are blue, patches
    into which others were merged purple.

    Args:
        image: the image of that call.
        kept: `model.kept[i]`, or what a pruner's `select` returned.
        model: the model, for its preprocessing, grid and layout.
        square: outline the widest square of dropped patches.
    """
    alike = Pruner() if model.pruner.asks else None  # what was asked is not known here
    seen = chosen(look(model, image, pruner=alike), kept)
    widths = [sheet.index.shape[1] / sheet.index.shape[0] for sheet in seen.sheets]
    figure = Picture(figsize=(3.4 * sum(widths) + 0.5, 4.2), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    for panel, sheet in zip(axes, seen.sheets, strict=True):
        show_kept(panel, seen, sheet, square=square)
        if len(widths) > 1:
            panel.set_title(sheet.title, fontsize=9)
    figure.suptitle(f"{seen.packed.patches} of {seen.packed.total} patch tokens", fontsize=10)
    add_legend(figure, [seen], square=square)
    return figure


def show_kept(axes: Axes, seen: Look, sheet: Sheet, *, square: bool = True) -> None:
    """Fill axes with a sheet; below it how many patches are kept, and the widest empty square."""
    stages = seen.laid(sheet)
    show(axes, paint(sheet.pixels, stages), sheet)
    words = _words(seen, sheet, stages)
    if not (stages > DROPPED).any():
        plate = {"facecolor": "white", "edgecolor": "none"}
        place = {"transform": axes.transAxes, "ha": "center", "fontsize": 8, "bbox": plate}
        axes.text(0.5, 0.5, "merged tokens only", **place)
    if square:
        widest = widest_square(stages == DROPPED)
        outline(axes, widest)
        words.append(f"{SQUARE}: {widest.side} x {widest.side}" if widest.side else "none empty")
    axes.set_xlabel("\n".join(words), fontsize=8)


def _words(seen: Look, sheet: Sheet, stages: np.ndarray) -> list[str]:
    """How many patches are kept, and what the other tokens are; these under the first sheet."""
    merged = int((stages == CENTRE).sum())
    kept = int((stages > DROPPED).sum()) - merged
    others = [f"{merged} merged"] if merged else []
    if seen.unplaced and sheet is seen.sheets[0]:
        others.append(f"{seen.unplaced} unplaced")
    return [f"{kept} of {int(sheet.inside.sum())} kept", *([", ".join(others)] if others else [])]


def show(axes: Axes, pixels: np.ndarray, sheet: Sheet, **options: Any) -> None:
    """Fill axes with pixels, one unit per patch, and draw the seams of AnyRes tiles."""
    rows, columns = sheet.index.shape
    extent = (0, columns, rows, 0)
    axes.imshow(pixels, extent=extent, interpolation="nearest", **options)
    axes.set(xticks=[], yticks=[], anchor="N")
    for position in range(sheet.n, columns, sheet.n):
        axes.axvline(position, color="black", linewidth=1.2)
    for position in range(sheet.n, rows, sheet.n):
        axes.axhline(position, color="black", linewidth=1.2)


def paint(pixels: np.ndarray, stages: np.ndarray, cell: int | None = None) -> np.ndarray:
    """Mark every patch on the image by its stage, (rows * cell, columns * cell, 3) uint8.

    Args:
        pixels: (H, W, 3) uint8.
        stages: (rows, columns) of CROPPED, DROPPED, KEPT, CENTRE and the numbers of stages.
        cell: side of a patch in pixels; by default large enough to be read in print.
    """
    rows, columns = stages.shape
    cell = cell or max(12, 576 // max(rows, columns))
    size = (columns * cell, rows * cell)
    resized = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    picture = np.asarray(resized, np.float32)
    each = np.kron(stages, np.ones((cell, cell), np.int8))
    grey = picture @ np.array([0.299, 0.587, 0.114], np.float32)
    painted = np.where((each > 0)[..., None], picture, (0.3 * grey + 0.7 * PAPER)[..., None])
    for stage in np.unique(stages[stages > DROPPED]):
        color, mark = _mark(int(stage), cell)
        here = each == stage
        painted[here] = 0.85 * painted[here] + 0.15 * np.array(color)
        painted[here & np.tile(mark, (rows, columns))] = color
    painted[each == CROPPED] = 255
    return painted.round().astype(np.uint8)


def outline(axes: Axes, square: Square) -> None:
    """Draw the border of a square of patches."""
    for color, width in (("black", 3.2), (np.array(YELLOW) / 255, 1.6)):
        border = {"fill": False, "edgecolor": color, "linewidth": width, "clip_on": False}
        if square.side:
            corner = (square.left, square.top)
            axes.add_patch(Rectangle(corner, square.side, square.side, **border))


def add_legend(figure: Figure, looks: Sequence[Look], *, square: bool = False) -> None:
    """Explain the marks in these looks, with swatches painted as the patches are."""
    names: dict[int, str] = {}
    for seen in looks:
        for stage, name in seen.names.items():
            known = names.get(stage, name)
            names[stage] = known if name in known else f"{known}, {name}"
    names = dict(sorted(names.items())) | {DROPPED: "dropped"}
    if any(not sheet.inside.all() for seen in looks for sheet in seen.sheets):
        names[CROPPED] = "letterbox"
    add_marks(figure, names, square=square)


def add_marks(figure: Figure, names: Mapping[int, str], *, square: bool = False) -> None:
    """A legend of stages by name."""
    items: list[np.ndarray | str] = []
    for stage, name in names.items():
        swatch = paint(np.full((1, 1, 3), 150, np.uint8), np.array([[stage]]), 24)
        items += [swatch if stage > DROPPED else _framed(swatch, 90), name]
    if square:
        ring = _framed(np.full((24, 24, 3), PAPER, np.uint8), 0, 7)
        ring[2:-2, 2:-2] = _framed(ring[2:-2, 2:-2], YELLOW)
        items += [ring, SQUARE]
    add_key(figure, items)


def add_key(figure: Figure, items: Sequence[np.ndarray | str]) -> None:
    """A line of swatches and words in a strip of its own at the bottom of the figure."""
    boxes = [
        TextArea(item, textprops={"fontsize": 7.5})
        if isinstance(item, str)
        else OffsetImage(item, zoom=0.36, interpolation="nearest")
        for item in items
    ]
    pairs = [
        HPacker(children=pair, align="center", pad=0, sep=4)
        for pair in zip(boxes[::2], boxes[1::2], strict=True)
    ]
    row = HPacker(children=pairs, align="center", pad=0, sep=10)
    if figure.get_layout_engine() is not None:
        strip = 0.3 / figure.get_size_inches()[1]
        figure.get_layout_engine().set(rect=(0, strip, 1, 1 - strip))
    figure.add_artist(
        AnchoredOffsetbox(
            "lower center",
            child=row,
            frameon=False,
            pad=0,
            borderpad=0.5,
            bbox_to_anchor=(0.5, 0),
            bbox_transform=figure.transFigure,
        )
    )


def _mark(stage: int, cell: int) -> tuple[tuple[int, int, int], np.ndarray]:
    """Colour of a stage, and where a patch of it is painted with it, (cell, cell) bool.

    Every second stage has a corner as well, for print in black and white.
    """
    width = max(1, cell // 10)
    mark = np.ones((cell, cell), bool)
    mark[width:-width, width:-width] = False
    if stage in (KEPT, CENTRE):
        return (BLUE if stage == KEPT else PURPLE), mark
    steps = np.arange(cell)
    second = stage % 2 == 0
    return (RED, mark | (steps[:, None] + steps < cell * 0.55)) if second else (GREEN, mark)


def _framed(swatch: np.ndarray, color: int | tuple[int, int, int], width: int = 3) -> np.ndarray:
    framed = np.empty_like(swatch)
    framed[:] = color
    inner = slice(width, -width)
    framed[inner, inner] = swatch[inner, inner]
    return framed
