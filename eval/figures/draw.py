"""Draw kept tokens on the image they come from.

In a notebook, after any call of the model:

    from eval.figures.draw import draw_kept
    draw_kept(image, model.kept[0], model)
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnchoredOffsetbox, HPacker, OffsetImage, TextArea
from PIL import Image

if TYPE_CHECKING:
    from eval.figures.look import Look, Sheet
    from llava_hivtp.anyres import PackedImage
    from llava_hivtp.vision import KeptTokens

# Okabe and Ito's colours: green and red that colour-blind eyes tell apart. A corner marks the
# local stage as well, for print in black and white.
GREEN, RED, YELLOW = (0, 158, 115), (213, 94, 0), (240, 228, 66)
PAPER = 226  # dropped patches fade towards this grey
DROPPED, GLOBAL, LOCAL, CROPPED = 0, 1, 2, -1
DPI = 150


class Picture(Figure):
    """A figure that shows itself in a notebook, whatever the backend."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=DPI)
        return file.getvalue()


def draw_kept(
    image: Image.Image, kept: PackedImage | KeptTokens, model: Any, *, hole: bool = True
) -> Picture:
    """Draw one image with its kept tokens: global green, local red with a corner, dropped pale.

    The image is shown as the vision tower sees it: squared, cropped, or cut into AnyRes tiles.
    The stages of HIVTP are told apart while `model.pruner` is the one that chose `kept`; the
    tokens of any other method are green.

    Args:
        image: the image of that call.
        kept: `model.kept[i]`, or what a pruner's `select` returned.
        model: the model, for its preprocessing, grid and layout.
        hole: outline the largest hole of dropped patches.
    """
    from eval.figures.look import chosen, look

    seen = chosen(look(model, image), kept)
    widths = [sheet.index.shape[1] / sheet.index.shape[0] for sheet in seen.sheets]
    figure = Picture(figsize=(3.4 * sum(widths) + 0.5, 4.2), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    for panel, sheet in zip(axes, seen.sheets, strict=True):
        show_kept(panel, seen, sheet, hole=hole)
        if len(widths) > 1:
            panel.set_title(sheet.title, fontsize=9)
    figure.suptitle(f"{seen.packed.patches} of {seen.packed.total} patch tokens", fontsize=10)
    add_legend(figure, [seen], hole=hole)
    return figure


def show_kept(axes: Axes, seen: Look, sheet: Sheet, *, hole: bool = True) -> None:
    """Fill axes with a sheet, its kept patches, and below it the size of the largest hole."""
    stages = seen.laid(sheet)
    show(axes, paint(sheet.pixels, stages), sheet)
    kept = int((stages > DROPPED).sum())
    if not kept:
        plate = {"facecolor": "white", "edgecolor": "none"}
        place = {"transform": axes.transAxes, "ha": "center", "fontsize": 8, "bbox": plate}
        axes.text(0.5, 0.5, "merged tokens only", **place)
    words = [f"{kept} of {int(sheet.inside.sum())} kept"]
    if hole:
        from eval.figures.look import largest_hole, widest_hole

        mask, side = largest_hole(stages), widest_hole(stages)
        outline(axes, mask)
        words.append(f"largest hole {int(mask.sum())}, {side} x {side} empty")
    axes.set_xlabel("\n".join(words), fontsize=8)


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
        stages: (rows, columns) of DROPPED, GLOBAL, LOCAL and CROPPED.
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
    frame, corner = (np.tile(mark, (rows, columns)) for mark in _marks(cell))
    for stage, color, mark in ((GLOBAL, GREEN, frame), (LOCAL, RED, frame | corner)):
        here = each == stage
        painted[here] = 0.85 * painted[here] + 0.15 * np.array(color)
        painted[here & mark] = color
    painted[each == CROPPED] = 255
    return painted.round().astype(np.uint8)


def outline(axes: Axes, mask: np.ndarray) -> None:
    """Draw the border of a set of patches."""
    padded = np.pad(mask, 1)
    down = np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1])  # between one row and the next
    across = np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1])
    edges = [((x, y), (x + 1, y)) for y, x in down] + [((x, y), (x, y + 1)) for y, x in across]
    for color, width in (("black", 3.2), (np.array(YELLOW) / 255, 1.6)):
        lines = LineCollection(edges, colors=[color], linewidths=width, capstyle="round")
        lines.set_clip_on(False)
        axes.add_collection(lines)


def add_legend(figure: Figure, looks: Sequence[Look], *, hole: bool = False) -> None:
    """Explain the marks in these looks, with swatches painted as the patches are."""
    names: dict[int, str] = {}
    for seen in looks:
        for stage, name in seen.names.items():
            known = names.get(stage, name)
            names[stage] = known if name in known else f"{known}, {name}"
    names = dict(sorted(names.items())) | {DROPPED: "dropped"}
    if any(not sheet.inside.all() for seen in looks for sheet in seen.sheets):
        names[CROPPED] = "letterbox"
    add_marks(figure, names, hole=hole)


def add_marks(figure: Figure, names: Mapping[int, str], *, hole: bool = False) -> None:
    """A legend of stages by name."""
    items: list[np.ndarray | str] = []
    for stage, name in names.items():
        swatch = paint(np.full((1, 1, 3), 150, np.uint8), np.array([[stage]]), 24)
        items += [swatch if stage > DROPPED else _framed(swatch, 90), name]
    if hole:
        ring = _framed(np.full((24, 24, 3), PAPER, np.uint8), 0, 7)
        ring[2:-2, 2:-2] = _framed(ring[2:-2, 2:-2], YELLOW)
        items += [ring, "largest hole"]
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


def _marks(cell: int) -> tuple[np.ndarray, np.ndarray]:
    """Frame and corner of one patch, (cell, cell) bool each."""
    width = max(1, cell // 10)
    frame = np.ones((cell, cell), bool)
    frame[width:-width, width:-width] = False
    steps = np.arange(cell)
    return frame, steps[:, None] + steps < cell * 0.55


def _framed(swatch: np.ndarray, color: int | tuple[int, int, int], width: int = 3) -> np.ndarray:
    framed = np.empty_like(swatch)
    framed[:] = color
    inner = slice(width, -width)
    framed[inner, inner] = swatch[inner, inner]
    return framed
