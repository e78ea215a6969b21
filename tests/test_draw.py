"""Kept tokens on an image: every mark where it belongs, in colours that can be told apart."""

import io
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from eval.figures.draw import (
    CROPPED,
    DROPPED,
    GLOBAL,
    GREEN,
    LOCAL,
    RED,
    Picture,
    draw_kept,
    outline,
    paint,
)
from eval.figures.look import chosen, fitted, largest_hole, look, widest_hole
from llava_hivtp import PRUNERS, build_pruner, load

GREY = 100
# The middle of a patch of a grey image: a tint of the stage's colour, or paler than the image.
MIDDLE = {
    GLOBAL: (85, 109, 102),
    LOCAL: (117, 99, 85),
    DROPPED: (188, 188, 188),
    CROPPED: (255, 255, 255),
}


@pytest.fixture(scope="module")
def flat(tiny):
    model, *_ = load(tiny(), build_pruner("hivtp", layers=(2, 3)))
    return model


@pytest.fixture(scope="module")
def anyres(tiny):
    model, *_ = load(tiny(anyres=True), build_pruner("hivtp", layers=(2, 3)))
    return model


def noise(size, seed=0):
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def test_every_patch_is_painted_by_its_stage():
    stages = np.array([[GLOBAL, LOCAL, DROPPED], [CROPPED, DROPPED, GLOBAL]])
    painted = paint(np.full((20, 30, 3), GREY, np.uint8), stages, cell=20)
    assert painted.shape == (40, 60, 3)
    for (row, column), stage in np.ndenumerate(stages):
        cell = painted[20 * row : 20 * row + 20, 20 * column : 20 * column + 20]
        assert tuple(cell[12, 12]) == MIDDLE[stage]
        frame = {GLOBAL: GREEN, LOCAL: RED}.get(stage, MIDDLE[stage])
        for edge in (cell[0], cell[-1], cell[:, 0], cell[:, -1]):
            assert (edge == frame).all()


def test_the_stages_differ_without_colour():
    pixels = np.full((20, 20, 3), GREY, np.uint8)
    filled = {}
    for stage, color in ((GLOBAL, GREEN), (LOCAL, RED)):
        painted = paint(pixels, np.array([[stage]]), cell=20)
        filled[stage] = (painted[2:10, 2:10] == color).all(-1).sum()
    assert filled[GLOBAL] == 0
    assert filled[LOCAL] > 20  # the corner


def test_the_figure_shows_every_patch_of_the_call(flat):
    image = Image.new("RGB", (80, 80), (GREY,) * 3)
    image.paste((GREY - 2,) * 3, (0, 0, 30, 50))  # so that scores differ
    seen = look(flat, image)
    figure = draw_kept(image, seen.packed, flat, hole=False)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (axes,) = figure.axes
    (sheet,) = seen.sheets
    drawn = np.asarray(canvas.buffer_rgba())[..., :3].astype(int)
    for (row, column), stage in np.ndenumerate(seen.laid(sheet)):
        x, y = axes.transData.transform((column + 0.7, row + 0.7))
        pixel = drawn[len(drawn) - 1 - int(y), int(x)]
        assert abs(pixel - MIDDLE[stage]).max() <= 4  # the image itself varies by two
    assert set(np.unique(seen.stages)) == {DROPPED, GLOBAL, LOCAL}


def test_stages_are_told_apart_only_while_the_pruner_chose_them(flat):
    image = noise((80, 80))
    seen = look(flat, image)
    assert chosen(seen, seen.packed).names == {GLOBAL: "global stage", LOCAL: "local stage"}
    kept = seen.packed.kept
    fewer = replace(kept, tokens=kept.tokens[:3], tile=kept.tile[:3], patch=kept.patch[:3])
    changed = chosen(seen, fewer)
    assert changed.names == {GLOBAL: "kept"}
    assert (changed.stages == GLOBAL).sum() == 3
    assert changed.packed.patches == 3


def test_looking_leaves_the_model_as_it_was(flat):
    flat.kept = before = ["the last call"]
    pruner = flat.pruner
    seen = look(flat, noise((80, 60)), layers=(1, 4))
    assert flat.kept is before
    assert flat.pruner is pruner
    assert sorted(seen.importance) == [1, 4]


def test_the_sheets_show_what_the_tower_saw(anyres):
    image = noise((112, 56))  # two tiles, without letterbox
    base, mosaic = look(anyres, image).sheets
    assert np.array_equal(mosaic.pixels, np.asarray(image))
    assert mosaic.inside.all()
    assert base.pixels.shape == (56, 56, 3)
    # Patch 0 of tile 2 (index 2 N) lies right of the seam, on the first row.
    assert mosaic.index[0, 4] == 2 * 16


@pytest.mark.parametrize("size", [(112, 40), (30, 112), (56, 112), (100, 90)])
def test_the_letterbox_is_what_the_layout_crops(anyres, size):
    seen = look(anyres, noise(size))
    inside = sum(int(sheet.inside.sum()) for sheet in seen.sheets)
    assert inside == seen.packed.total
    shown = sum(int((seen.laid(sheet) > DROPPED).sum()) for sheet in seen.sheets)
    assert shown == seen.packed.patches
    anyres.layout = "mosaic"
    try:
        assert all(sheet.inside.all() for sheet in look(anyres, noise(size)).sheets)
    finally:
        anyres.layout = "unpad"


@pytest.mark.parametrize(
    ("rows", "size", "side"),
    [
        (["000", "000"], 6, 2),
        (["111", "111"], 0, 0),
        (["010", "101", "010"], 1, 1),  # corners do not join
        (["001", "011", "100"], 3, 1),
        (["0-0", "0-0", "0-1"], 3, 1),  # the letterbox is no hole, and joins none
        (["001", "111", "100"], 2, 1),
        (["1000", "0000", "0010", "0000"], 14, 2),
        (["1000", "0000", "0000", "1111"], 11, 3),
    ],
)
def test_the_largest_hole_is_joined_by_sides(rows, size, side):
    stages = np.array([[{"0": DROPPED, "1": GLOBAL, "-": CROPPED}[c] for c in row] for row in rows])
    mask = largest_hole(stages)
    assert mask.sum() == size
    assert (stages[mask] == DROPPED).all()
    assert widest_hole(stages) == side


def test_the_outline_is_the_border_of_the_hole():
    figure = Picture()
    axes = figure.add_subplot()
    outline(axes, np.array([[True, True], [False, True]]))
    edges = {tuple(map(tuple, segment)) for segment in axes.collections[0].get_segments()}
    assert len(edges) == 8  # three joined cells
    assert ((1.0, 1.0), (1.0, 2.0)) in edges
    assert ((1.0, 0.0), (1.0, 1.0)) not in edges


def test_a_notebook_shows_the_figure(flat):
    image = noise((80, 80))
    figure = draw_kept(image, look(flat, image).packed.kept, flat)
    shown = Image.open(io.BytesIO(figure._repr_png_()))
    assert shown.format == "PNG"
    assert min(shown.size) > 300


@pytest.mark.parametrize("name", sorted(set(PRUNERS) - {"none"}))
def test_every_method_can_be_drawn_at_any_depth(flat, name):
    arguments = {"k": 25} if name == "hivtp" else {"keep": 0.5}
    before, image = flat.pruner, noise((80, 80))
    try:
        flat.pruner = fitted(name, 4, **arguments)
        seen = look(flat, image)
        FigureCanvasAgg(draw_kept(image, seen.packed, flat)).draw()
    finally:
        flat.pruner = before
    placed = int((seen.packed.kept.patch >= 0).sum())
    assert (seen.stages > DROPPED).sum() == placed


@pytest.mark.parametrize(
    ("name", "layers"),
    [("hivtp", (4, 5)), ("fopru", (11,)), ("hired", (1, 11)), ("prumerge", (12,))],
)
def test_layers_move_with_the_depth(name, layers):
    assert fitted(name, 12).layers == layers
    assert fitted(name, 24) == build_pruner(name)
    named = tuple(range(3, 3 + len(layers)))
    assert fitted(name, 12, layers=named).layers == named
