"""Figures of several panels: heat maps per layer, kept tokens by method, with answers."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.gridspec import GridSpecFromSubplotSpec, SubplotSpec
from PIL import Image

from eval.figures.draw import add_key, add_legend, show, show_kept
from eval.figures.look import Look, Sheet
from eval.figures.questions import ImageQuestion
from eval.report.picture import DPI, GREEN, Picture
from llava_hivtp.answer import Answer

HEAT = "cividis"  # one scale of lightness, the same for colour-blind eyes
PER_LINE = 12  # panels of a heat map side by side


@dataclass(frozen=True)
class Comparison:
    """One question about one image, answered by the same model under several pruners."""

    asked: ImageQuestion
    answers: Mapping[str, Answer]  # name of the pruner -> answer
    looks: Mapping[str, Look]  # name of the pruner -> what it kept; those that are drawn

    def is_right(self, name: str) -> bool:
        """Whether an answer is the expected one, in any case, with or without a full stop."""
        said, gold = (
            words.strip().rstrip(".").lower()
            for words in (self.answers[name].text, self.asked.gold)
        )
        return said == gold


def draw_heat(looks: Sequence[Look], scored: Sequence[int] = ()) -> Picture:
    """Importance in every encoder layer, one panel per layer, one block per image.

    Every panel has its own scale, from its least to its best attended patch. `scored` layers,
    those a pruner reads, stand in a green frame.
    """
    blocks = [(seen, sheet) for seen in looks for sheet in seen.sheets]
    columns = [min(PER_LINE, max(4, int(PER_LINE / _aspect(sheet)))) for _, sheet in blocks]
    lines = [
        math.ceil(len(seen.importance) / per)
        for (seen, _), per in zip(blocks, columns, strict=True)
    ]
    heights = [
        n * (11.5 / (per + 1) / _aspect(sheet) + 0.24)
        for n, per, (_, sheet) in zip(lines, columns, blocks, strict=True)
    ]
    figure = Picture(figsize=(12, sum(heights) + 0.55), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)
    grid = figure.add_gridspec(len(blocks), 1, height_ratios=heights)
    for place, (seen, sheet), n, per in zip(grid, blocks, lines, columns, strict=True):
        _heat_block(figure, place.subgridspec(n, per + 1), seen, sheet, scored)
    scale = colormaps[HEAT](np.linspace(0, 1, 240))[None, :, :3].repeat(24, 0)
    add_key(figure, [(scale * 255).astype(np.uint8), "from the least to the most attended patch"])
    return figure


def draw_comparisons(compared: Sequence[Comparison]) -> Picture:
    """Kept tokens of every image under its pruners, beside question and answers."""
    looks = [seen for one in compared for seen in one.looks.values()]
    wide = max(sum(_aspect(sheet) for sheet in seen.sheets) for seen in looks)
    panels = len(compared[0].looks)
    unit = min(2.3, 10.5 / (1 + panels * wide))  # inches, of a square panel
    widths = [unit, *[unit * wide] * panels, 2.6]
    words = [_words(one) for one in compared]
    heights = [max(unit + 0.65, 0.2 * text.count("\n") + 0.5) for text in words]
    size = (sum(widths), sum(heights) + 0.3)
    figure = Picture(figsize=size, dpi=DPI, layout="constrained")
    grid = figure.add_gridspec(
        len(compared), panels + 2, width_ratios=widths, height_ratios=heights
    )
    for line, one in enumerate(compared):
        _image_panel(figure.add_subplot(grid[line, 0]), one.asked.image)
        for column, (title, seen) in enumerate(one.looks.items(), 1):
            ratios = [_aspect(sheet) for sheet in seen.sheets]
            cells = grid[line, column].subgridspec(1, len(ratios), width_ratios=ratios)
            _kept_panels(figure, cells, seen, title)
        _write(figure.add_subplot(grid[line, -1]), words[line])
    add_legend(figure, looks, square=True)
    return figure


def draw_methods(image: Image.Image, looks: Mapping[str, Look]) -> Picture:
    """One image, every method's kept tokens."""
    ratios = [_aspect(sheet) for sheet in next(iter(looks.values())).sheets]
    most = 8 if len(ratios) == 1 else 3 if sum(ratios) < 4 else 2  # methods side by side
    lines = math.ceil((1 + len(looks)) / most)
    per = math.ceil((1 + len(looks)) / lines)
    height = 12 / per / sum(ratios) + 0.65
    figure = Picture(figsize=(12, lines * height + 0.3), dpi=DPI, layout="constrained")
    # One flat grid: margins of nested grids do not reach the rows around them.
    grid = figure.add_gridspec(lines, per * len(ratios), width_ratios=ratios * per)
    cells = [
        grid[i // per, (i % per) * len(ratios) + j]
        for i in range(1 + len(looks))
        for j in range(len(ratios))
    ]
    _image_panel(figure.add_subplot(grid[0, : len(ratios)]), image)
    for place, (title, seen) in enumerate(looks.items(), 1):
        mine = cells[place * len(ratios) : (place + 1) * len(ratios)]
        _kept_panels(figure, mine, seen, title, square=False)
    add_legend(figure, list(looks.values()))
    return figure


def _heat_block(
    figure: Picture,
    grid: GridSpecFromSubplotSpec,
    seen: Look,
    sheet: Sheet,
    scored: Sequence[int],
) -> None:
    first = figure.add_subplot(grid[0, 0])
    show(first, sheet.pixels, sheet)
    first.set_title(sheet.title, fontsize=8)
    per = grid.ncols - 1
    for place, (layer, values) in enumerate(sorted(seen.importance.items())):
        panel = figure.add_subplot(grid[place // per, 1 + place % per])
        show_heat(panel, sheet, values)
        panel.set_title(f"layer {layer}", fontsize=8)
        if layer in scored:
            panel.title.set(color=np.array(GREEN) / 255, weight="bold")
            for spine in panel.spines.values():
                spine.set(color=np.array(GREEN) / 255, linewidth=2.5)


def show_heat(axes: Axes, sheet: Sheet, values: np.ndarray) -> None:
    """Fill axes with (T, N) values on a sheet, on a scale of their own."""
    laid = np.ma.masked_where(~sheet.inside, sheet.lay(values))
    show(axes, laid, sheet, cmap=HEAT)


def _image_panel(axes: Axes, image: Image.Image) -> None:
    axes.imshow(image)
    axes.set(xticks=[], yticks=[], anchor="N")
    axes.set_title("image", fontsize=9)
    axes.set_xlabel(" \n ", fontsize=8)  # as tall as its neighbours


def _kept_panels(
    figure: Picture, cells: Iterable[SubplotSpec], seen: Look, title: str, square: bool = True
) -> None:
    for cell, sheet in zip(cells, seen.sheets, strict=True):
        panel = figure.add_subplot(cell)
        show_kept(panel, seen, sheet, square=square)
        if not square and "\n" not in panel.get_xlabel():
            panel.set_xlabel(f"{panel.get_xlabel()}\n ", fontsize=8)  # so that panels stand in line
        panel.set_title(title if sheet is seen.sheets[0] else sheet.title, fontsize=9)


def _words(compared: Comparison) -> str:
    lines = [compared.asked.question]
    if compared.asked.gold:
        lines.append(f"Right answer: {compared.asked.gold}")
    for name, answer in compared.answers.items():
        mark = ""
        if compared.asked.gold:
            mark = "  (right)" if compared.is_right(name) else "  (wrong)"
        lines.append(f"{name}, {answer.patches} tokens:")
        lines.append(f"   {answer.text}{mark}")
    lines = ["".join(c if c.isprintable() else "?" for c in line) for line in lines]
    return "\n".join(textwrap.fill(line, 34, subsequent_indent="   ") for line in lines)


def _write(axes: Axes, words: str) -> None:
    axes.axis("off")
    text = axes.text(
        0, 1, words, va="top", ha="left", fontsize=9, linespacing=1.5, parse_math=False
    )
    text.set_in_layout(False)  # its room is given


def _aspect(sheet: Sheet) -> float:
    return sheet.index.shape[1] / sheet.index.shape[0]
