"""Kept tokens on an image: every mark where it belongs, in colours that can be told apart."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from eval.figures.draw import draw_kept, outline, paint
from eval.figures.look import (
    CENTRE,
    CROPPED,
    DROPPED,
    GLOBAL,
    KEPT,
    LOCAL,
    chosen,
    cropped_to,
    look,
)
from eval.figures.panels import draw_methods
from eval.figures.square import Square, widest_square
from eval.report.picture import BLUE, GREEN, RED, Picture
from llava_hivtp import PRUNERS, build_pruner, load
from llava_hivtp.pruners import for_depth

GREY = 100
# The middle of a patch of a grey image: a tint of the stage's colour, or paler than the image.
MIDDLE = {
    GLOBAL: (85, 109, 102),
    LOCAL: (117, 99, 85),
    KEPT: (85, 102, 112),
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
    stages = np.array([[GLOBAL, LOCAL, DROPPED], [CROPPED, KEPT, GLOBAL]])
    painted = paint(np.full((20, 30, 3), GREY, np.uint8), stages, cell=20)
    assert painted.shape == (40, 60, 3)
    for (row, column), stage in np.ndenumerate(stages):
        cell = painted[20 * row : 20 * row + 20, 20 * column : 20 * column + 20]
        assert tuple(cell[12, 12]) == MIDDLE[stage]
        frame = {GLOBAL: GREEN, LOCAL: RED, KEPT: BLUE}.get(stage, MIDDLE[stage])
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
    figure = draw_kept(image, seen.packed, flat, square=False)
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
    assert changed.names == {KEPT: "kept"}
    assert (changed.stages == KEPT).sum() == 3
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
    ("rows", "square"),
    [
        (["000", "000"], (0, 0, 2)),
        (["111", "111"], None),
        (["010", "101", "010"], (0, 0, 1)),
        (["-0-", "-0-", "-01"], (0, 1, 1)),  # the letterbox is not empty: it is not there
        (["1000", "0000", "0010", "0000"], (0, 1, 2)),
        (["1000", "0000", "0000", "1111"], (0, 1, 3)),
    ],
)
def test_the_widest_empty_square_is_found_and_outlined(rows, square):
    stages = np.array([[{"0": DROPPED, "1": GLOBAL, "-": CROPPED}[c] for c in row] for row in rows])
    found = widest_square(stages == DROPPED)
    axes = Picture().add_subplot()
    outline(axes, found)
    if square is None:
        assert found.side == 0
        assert not axes.patches
        return
    assert found == Square(*square)
    top, left, side = square
    for patch in axes.patches:
        assert (*patch.get_xy(), patch.get_width(), patch.get_height()) == (left, top, side, side)


@pytest.mark.parametrize("seed", range(5))
def test_the_local_stage_leaves_no_wide_square_empty(flat, seed):
    with_windows = for_depth(build_pruner("hivtp", k=25, c=2), 4)
    without = for_depth(build_pruner("hivtp", k=50, c=None), 4)
    sides = []
    for pruner in (with_windows, without):
        seen = look(flat, noise((80, 80), seed), pruner=pruner)
        figure = draw_kept(noise((80, 80), seed), seen.packed, flat)
        words = figure.axes[0].get_xlabel()
        sides.append(widest_square(seen.laid(seen.sheets[0]) == DROPPED).side)
        assert f"widest empty square: {sides[-1]} x {sides[-1]}" in words
        assert "hole" not in words
    assert sides[0] <= 2  # 2 c - 2: any wider square holds a whole window, which keeps a patch


def test_only_a_method_with_stages_is_drawn_with_them(flat):
    called = {}
    for name in ("hivtp", "uniform"):
        pruner = for_depth(build_pruner(name, **({"keep": 0.5} if name == "uniform" else {})), 4)
        called[name] = look(flat, noise((80, 80)), pruner=pruner).names
    assert called == {
        "hivtp": {GLOBAL: "global stage", LOCAL: "local stage"},
        "uniform": {KEPT: "kept"},
    }
    # 12 of 16 patches in 4 windows: one of them is whole, so its pick is left for `fill`.
    filled = for_depth(build_pruner("hivtp", r=1, k=75, c=2, fill=True), 4)
    assert look(flat, noise((80, 80)), pruner=filled).names[KEPT] == "filled up"


def test_the_patches_that_others_are_merged_into_have_a_place(flat):
    """PruMerge keeps no patch as it is; VisionZip adds CLS, and contextual tokens with a place."""
    image = noise((80, 80))
    words = {}
    for name in ("prumerge", "visionzip"):
        seen = look(flat, image, pruner=for_depth(build_pruner(name, keep=0.5), 4))
        # Of the choice of a method that is not attached, what was merged is not known.
        assert CENTRE not in chosen(look(flat, image), seen.packed).names
        figure = draw_methods(image, {name: seen})
        words[name] = figure.axes[1].get_xlabel().split("\n")
        assert seen.names[CENTRE] == "merged with others"
    assert words == {
        "prumerge": ["0 of 16 kept", "7 merged, 1 unplaced"],
        "visionzip": ["6 of 16 kept", "1 merged, 1 unplaced"],
    }


def test_what_the_preprocessing_crops_is_known(flat, anyres, monkeypatch):
    wide = Image.fromarray(np.tile(np.arange(80, dtype=np.uint8), (40, 1))).convert("RGB")
    assert cropped_to(flat, wide.size) is None  # it is padded, as LLaVA-v1.5 does
    assert cropped_to(anyres, wide.size) is None  # it is cut into tiles
    monkeypatch.setattr(flat.config, "image_aspect_ratio", None)
    assert cropped_to(flat, wide.size) == (40, 40)
    (sheet,) = look(flat, wide).sheets
    assert sheet.pixels.min() >= 18  # the middle 40 of 80 columns: values 20 to 59
    assert sheet.pixels.max() <= 61
    assert cropped_to(flat, (40, 40)) is None


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
        flat.pruner = for_depth(build_pruner(name, **arguments), 4)
        seen = look(flat, image, prompt=torch.arange(9, 20))
        FigureCanvasAgg(draw_kept(image, seen.packed, flat)).draw()
    finally:
        flat.pruner = before
    placed = int((seen.packed.kept.patch >= 0).sum())
    merged = seen.stages == CENTRE
    assert ((seen.stages > DROPPED) & ~merged).sum() == placed
    assert merged.sum() + seen.unplaced == len(seen.packed.kept) - placed
