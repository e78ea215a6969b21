"""The figures: complete, whole files, no label on another; flips and frontiers counted right."""

import json
import random
import re
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image
from typer.testing import CliRunner

from eval.__main__ import app
from eval.figures import flips, make
from eval.figures.draw import draw_kept
from eval.figures.flips import WITH, WITHOUT, answer_all, find_flips
from eval.figures.look import look
from eval.figures.panels import Comparison, draw_comparisons, draw_heat, draw_methods
from eval.figures.questions import ImageQuestion, benchmark_questions
from eval.figures.schematic import draw_schematic
from eval.plan.table import load_table
from eval.report.pareto import Point, draw_pareto, frontier
from eval.results.collect import collect
from llava_hivtp import build_pruner, load
from llava_hivtp.pruners import for_depth
from tests.stored import store_result, store_timing
from tests.test_draw import noise

LAYERS = (1, 2, 3, 4)


def fitted(name, depth, **arguments):
    return for_depth(build_pruner(name, **arguments), depth)


@pytest.fixture(scope="module", params=[False, True], ids=["v1.5", "anyres"])
def drawn_by(tiny, request):
    """A model with tokenizer, and an image for it."""
    model, tokenizer, *_ = load(tiny(anyres=request.param), fitted("hivtp", 4))
    return model, tokenizer, noise((112, 48) if request.param else (80, 80))


def overlapping(figure):
    """Pairs of texts that touch each other, and texts that leave the figure."""
    FigureCanvasAgg(figure).draw()
    hidden = {label for axes in figure.axes for label in _beyond(axes)}
    texts = [t for t in figure.findobj(Text) if t.get_text().strip() and t not in hidden]
    boxes = [(t.get_text(), t.get_window_extent()) for t in texts]
    width, height = figure.canvas.get_width_height()
    cut = [
        (words,)
        for words, b in boxes
        if b.x0 < -1 or b.y0 < -1 or b.x1 > width + 1 or b.y1 > height + 1
    ]
    hit = [
        (one, other)
        for i, (one, a) in enumerate(boxes)
        for other, b in boxes[:i]
        if min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1
    ]
    return cut + hit


def _beyond(axes):
    """Labels of ticks outside the axes; they are not drawn."""
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        for tick in axis.get_major_ticks():
            if not axes.axison or not low <= tick.get_loc() <= high:
                yield from (tick.label1, tick.label2)


def check_pdf(data):
    """The file is whole: its table of objects is where it says, and so is every object."""
    assert data.startswith(b"%PDF-")
    start = int(re.search(rb"startxref\s+(\d+)\s+%%EOF\s*$", data)[1])
    count = int(re.match(rb"xref\s+0 (\d+)", data[start:])[1])
    entries = re.findall(rb"(\d{10}) \d{5} n", data[start:])
    assert len(entries) == count - 1
    for offset in entries:
        assert re.match(rb"\d+ 0 obj", data[int(offset) :])
    assert data.count(b"/Type /Page\n") + data.count(b"/Type /Page ") == 1


def test_a_heat_map_has_a_panel_for_every_layer_of_every_image(drawn_by):
    model, _, image = drawn_by
    looks = [look(model, image, LAYERS), look(model, image.rotate(90), LAYERS)]
    figure = draw_heat(looks, scored=(2,))
    titles = [axes.get_title() for axes in figure.axes]
    blocks = sum(len(seen.sheets) for seen in looks)
    for layer in LAYERS:
        assert titles.count(f"layer {layer}") == blocks
    assert len(titles) == blocks * (1 + len(LAYERS))
    panels = iter(axes for axes in figure.axes if axes.get_title().startswith("layer"))
    for seen in looks:
        for sheet in seen.sheets:
            for layer in LAYERS:
                shown = next(panels).images[0].get_array()
                assert np.array_equal(shown, np.ma.array(sheet.lay(seen.importance[layer])))


def test_no_label_lies_on_another(drawn_by):
    model, tokenizer, image = drawn_by
    asked = ImageQuestion(
        image, "Is there a very small umbrella behind the second elephant?", "yes"
    )
    pruners = {WITH: fitted("hivtp", 4), WITHOUT: fitted("hivtp", 4, k=50, c=None)}
    sample = answer_all(model, tokenizer, asked, pruners)
    answers = {
        name: replace(a, text="A rather long answer. " * 3) for name, a in sample.answers.items()
    }
    looks = {}
    for name in ("hivtp", "fopru", "visionzip", "prumerge", "random", "avgpool"):
        model.pruner = fitted(name, 4, **({} if name == "hivtp" else {"keep": 0.5}))
        looks[name] = look(model, image)
    model.pruner = fitted("hivtp", 4)
    seen = look(model, image, LAYERS)
    figures = {
        "kept": draw_kept(image, seen.packed, model),
        "heat": draw_heat([seen, seen], scored=(2, 3)),
        "samples": draw_comparisons([replace(sample, answers=answers)] * 2),
        "methods": draw_methods(image, looks),
        "schematic": draw_schematic(),
    }
    assert {name: overlapping(figure) for name, figure in figures.items()} == {
        name: [] for name in figures
    }


def test_one_command_draws_all_figures(tiny, drawn, tmp_path):
    shared = ["figures", "--model", str(tiny()), "--data", str(drawn), "--out", str(tmp_path)]
    result = CliRunner().invoke(app, [*shared, "--samples", "1"])
    assert result.exit_code == 0, result.output
    names = {"method", "heat", "stages", "methods"}
    assert {path.stem for path in tmp_path.glob("*.png")} == names
    for name in names:
        with Image.open(tmp_path / f"{name}.png") as image:
            image.load()
            assert image.width > 600
        check_pdf((tmp_path / f"{name}.pdf").read_bytes())
        assert str(tmp_path / name) in result.output
    result = CliRunner().invoke(app, [*shared, "--flips", "--limit", "3"])
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "flips.json").read_text())
    assert summary["questions"] == 3
    assert set(summary["accuracy"]) == {"unpruned", WITH, WITHOUT}
    assert all(0 < side < 4 for side in summary["mean_widest_empty_square"].values())


@pytest.mark.slow
def test_images_of_ones_own_are_drawn(tiny, tmp_path):
    noise((50, 70)).save(tmp_path / "mine.png")
    arguments = ["figures", str(tmp_path / "mine.png"), "--question", "What is it?"]
    result = CliRunner().invoke(app, [*arguments, "--model", str(tiny()), "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "stages.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--block", "60"], "must be one of"),
        (["--task", "chess"], "--task must be one of mme, pope"),
        (["--data", "/nowhere"], "/nowhere lacks lmms-lab-encoder/POPE"),
        (["/nowhere/at.png"], "no image file at"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_a_line(tiny, tmp_path, arguments, words):
    asked = ["figures", "--model", str(tiny()), "--out", str(tmp_path), *arguments]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code != 0
    assert words in re.sub(r"\s+", " ", result.output)
    assert "Traceback" not in result.output


def test_samples_come_as_the_benchmark_has_them(drawn):
    asked = list(islice(benchmark_questions("pope", drawn), 5))
    assert len(asked) == 5
    assert {one.gold for one in asked} <= {"yes", "no"}
    assert asked[0].prompt.startswith(asked[0].question + "\n")
    assert asked[0].image.mode == "RGB"


def test_flips_are_counted_both_ways(monkeypatch):
    stages = {WITH: np.array([[0, 1, 2, 0]]), WITHOUT: np.array([[0, 0, 0, 1]])}
    sheet = SimpleNamespace()
    looks = {
        name: SimpleNamespace(sheets=[sheet], laid=lambda sheet, s=s: s.reshape(2, 2))
        for name, s in stages.items()
    }
    said = [("yes", "no"), ("Yes.", "no"), ("no", "yes"), ("no", "no"), ("yes", "yes")]

    def answer_one(model, tokenizer, asked, pruners):
        with_stage, without = said[int(asked.question)]
        texts = {"unpruned": "yes", WITH: with_stage, WITHOUT: without}
        return Comparison(asked, {n: SimpleNamespace(text=t) for n, t in texts.items()}, looks)

    monkeypatch.setattr(flips, "answer_all", answer_one)
    asked = [ImageQuestion(None, str(i), "yes") for i in range(len(said))]
    found = find_flips(None, None, asked, {}, keep=1)
    assert [sample.asked.question for sample in found.samples] == ["0"]
    assert found.summary() == {
        "questions": 5,
        "accuracy": {"unpruned": 100, WITH: 60, WITHOUT: 40},
        "mean_widest_empty_square": {WITH: 1, WITHOUT: 1},
        "only_right_with_local_stage": 2,
        "only_right_without": 1,
    }


def test_nothing_beats_the_frontier():
    rng = np.random.default_rng(0)
    found = [Point("m", *pair) for pair in rng.integers(0, 12, (40, 2)).tolist()]
    front = frontier(found)
    for point in found:
        beaten = [f for f in front if f.cost <= point.cost and f.accuracy >= point.accuracy]
        assert beaten
        better = [p for p in found if p.cost <= point.cost and p.accuracy > point.accuracy]
        if point in front:
            assert not better


def test_a_pareto_plot_shows_complete_rows_only_with_their_intervals():
    row = {name: SimpleNamespace(pruner=name, name="") for name in ("none", "hivtp", "fopru")}
    values = {
        "none": {"relative": 100.0, "tokens": 576.0, "ttft_ms": 100.0},
        "hivtp": {"relative": 98.0, "tokens": 280.0, "ttft_ms": 60.0},
        "fopru": {"tokens": 288.0},  # a benchmark has not run
    }
    intervals = {"hivtp": {"relative": (97.0, 98.5), "ttft_ms": (57.0, 64.0)}}
    rows = [
        SimpleNamespace(row=row[n], values=v, partial={}, intervals=intervals.get(n, {}))
        for n, v in values.items()
    ]
    figure = draw_pareto(SimpleNamespace(rows=rows, timing_device="a clock"))
    for axes, cost in zip(figure.axes, (280.0, 60.0), strict=True):
        drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
        assert drawn["HIVTP"] == [[cost, 98]]
        assert "FoPru" not in drawn
    bars = [
        [c.get_segments()[0].tolist() for c in axes.collections if len(c.get_segments())]
        for axes in figure.axes
    ]
    up, across = [[280, 97], [280, 98.5]], [[57, 98], [64, 98]]
    assert bars == [[approx(up)], [approx(across), approx([[60, 97], [60, 98.5]])]]
    assert overlapping(figure) == []
    rows[0].values.pop("relative")
    assert draw_pareto(SimpleNamespace(rows=rows, timing_device=None)) is None


def approx(points):
    return [pytest.approx(point) for point in points]


OWN = """
from dataclasses import dataclass
from llava_hivtp.pruners.base import ScorePruner

@dataclass
class LargestNorm(ScorePruner):
    power: float = 2.0

    def score(self, features):
        return features.tokens.float().norm(p=self.power, dim=-1)
"""


def test_a_method_of_ones_own_is_drawn_under_the_name_of_its_class(tiny, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(OWN)
    noise((50, 50)).save(tmp_path / "photo.png")
    shown = []
    monkeypatch.setattr(make, "save", lambda figure, stem: shown.append(figure))
    arguments = ["figures", str(tmp_path / "photo.png"), "--model", str(tiny())]
    for arguments_given in ("", ":power=1,keep=0.25"):
        arguments += ["--method", f"{tmp_path}/mine.py:LargestNorm{arguments_given}"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    titles = {axes.get_title(): axes.get_xlabel().split("\n")[0] for axes in shown[-1].axes}
    assert titles["LargestNorm"] == "8 of 16 kept"
    assert titles["LargestNorm (power=1,keep=0.25)"] == "4 of 16 kept"


def test_a_method_that_is_not_there_is_said_before_a_model_is_loaded(tmp_path):
    arguments = ["figures", "--model", str(tmp_path), "--method", f"{tmp_path}/none.py:Mine"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "none.py:Mine' cannot be imported" in result.output


@pytest.mark.parametrize("spelled", ["fastv", "fastv:after=2,encoder=hivtp:r=2"])
def test_what_chooses_inside_the_language_model_is_not_drawn(spelled):
    with pytest.raises(ValueError, match="chooses inside the language model, which no figure"):
        make.Methods(25, [spelled])


def test_a_pareto_plot_of_a_table_is_drawn_from_what_is_stored(table, tmp_path):
    config, out, model = table("pope, gqa"), tmp_path / "results", "liuhaotian/llava-v1.5-7b"
    loaded, rng = load_table(config, model), random.Random(0)
    for row in loaded.rows:
        for task in loaded.tasks:
            rights = [float(rng.random() < 0.7) for _ in range(40)]
            store_result(out, loaded, row, task, rights, patches=row.block)
            store_timing(out, loaded, row, task, 40 + row.block, 20.0)
    arguments = ["figures", "--table", str(config), "--model", model, "--results", str(out)]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "drawn")])
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "drawn/pareto-table.png") as image:
        assert image.width > 1200
    check_pdf((tmp_path / "drawn/pareto-table.pdf").read_bytes())
    figure = draw_pareto(collect(loaded, loaded.rows, out))
    (bar,) = (c for c in figure.axes[0].collections if len(c.get_segments()))
    low, high = bar.get_segments()[0][:, 1]
    (point,) = (
        line.get_xydata()[0] for line in figure.axes[0].get_lines() if line.get_label() == "HIVTP"
    )
    assert low < point[1] < high
