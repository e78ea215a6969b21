"""The methods on the family of towers: what is asked, how it is answered and compared."""

import json

import numpy as np
import pytest
import torch

from eval.nano import CHECKPOINTS
from eval.nano.draw import SIDE
from eval.nano.exam import EIGHT, draw_exam
from eval.nano.frontier import BUDGETS, Model, _area, answer, build_rows, scored
from eval.nano.frontier_report import PARTS, Tower, examine, report
from eval.nano.harder import HARDER
from eval.results.means import mean
from llava_hivtp import build_pruner
from llava_hivtp.pruners import for_depth

torch.set_num_threads(1)
FOLDER = CHECKPOINTS / "unguided"


@pytest.fixture(scope="module")
def items():
    return draw_exam("tune", 8)


def test_every_set_is_asked_and_mme_in_pairs(items):
    assert {item.set for item in items} == {*EIGHT, *HARDER}
    answers = [item.question.answer for item in items if item.set == "mme"]
    assert answers == ["Yes", "No"] * 4


def test_seeds_differ_and_an_unknown_one_is_named(items):
    assert [i.question for i in draw_exam("report", 8)] != [i.question for i in items]
    with pytest.raises(ValueError, match="seeds must be one of tune, report, got 'test'"):
        draw_exam("test", 8)


def test_harder_pictures_are_what_their_names_say(items):
    for item in items:
        things = item.picture.shapes
        if item.set == "border":
            assert all(min(t.x, t.y, SIDE - t.x, SIDE - t.y) <= 16 for t in things)
        if item.set == "apart":
            first, second = things
            assert abs(first.x - second.x) > SIDE / 2
            assert abs(first.y - second.y) > SIDE / 2
        if item.set == "beside":
            assert item.picture.sign
            assert len(things) >= 3


def test_a_question_is_about_what_it_names(items):
    for item in items:
        count = int(item.patches().sum())
        if item.set in ("textvqa", "ocrbench", "beside"):
            assert count == len(item.question.answer)
        if item.set in ("apart", "border") and item.question.answer != "No":
            assert 1 <= count <= 40


def test_every_row_keeps_its_budget_and_chooses_beside_others_as_alone(items):
    model = Model(FOLDER)
    images = [item.picture.image for item in items[::12][:3]]
    together, alone = model.see(images), [model.see([image]) for image in images]
    for row, pruner in build_rows().items():
        method, patches = for_depth(pruner, model.depth), BUDGETS[int(row.split("-")[-1])]
        kept = method.select(together)
        assert kept.patch.shape == (len(images) * patches,)
        if not method.seeded:  # a random choice depends on the tile's number
            each = torch.cat([method.select(one).patch for one in alone])
            assert torch.equal(kept.patch.cpu(), each.cpu()), row


def test_answers_go_on_after_a_stop_and_lead_to_a_report(items, tmp_path):
    rows = {name: p for name, p in build_rows().items() if name.startswith(("cover", "hivtp"))}
    some, file = items[::2], tmp_path / "unguided.jsonl"
    right = answer(FOLDER, some, rows, file)
    lines = file.read_text().splitlines()
    file.write_text(lines[0] + "\n")
    assert answer(FOLDER, some, rows, file) == right
    assert [json.loads(x) for x in file.read_text().splitlines()] == [json.loads(x) for x in lines]
    with pytest.raises(ValueError, match="holds other rows"):
        answer(FOLDER, some, {"none": build_pruner("none")}, file)
    full, blind = (mean(scored(some, right[row], EIGHT)).value for row in ("full", "blind"))
    assert full > blind + 15
    every = dict.fromkeys(build_rows(), right["full"]) | right
    text = report([Tower("unguided", [0.5] * 8, some, every)])
    assert all(f"## unguided, {part}" in text for part in PARTS)
    assert f"{full:.1f} [" in text


def test_an_unknown_tower_is_named(tmp_path):
    with pytest.raises(ValueError, match="no such tower: tall; choose from nodrop, unguided"):
        examine(tmp_path, 4, ["nodrop", "tall"])


def test_the_area_is_the_chance_to_order_a_pair_rightly():
    about = np.array([True, False, True, False])
    assert _area(np.array([4.0, 1.0, 3.0, 2.0]), about) == 1
    assert _area(np.array([1.0, 1.0, 1.0, 1.0]), about) == 0.5
    assert _area(np.array([1.0, 2.0, 4.0, 3.0]), about) == 0.5
