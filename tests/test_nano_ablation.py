"""Cover's parts on the towers: what is asked of the language model, budgets, losses, figures."""

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from eval.nano import CHECKPOINTS
from eval.nano.__main__ import app
from eval.nano.ablation import (
    BOTH,
    FREE,
    PLACED,
    ablate,
    build_ablation,
    find_reaches,
    row_of,
    things_in,
)
from eval.nano.exam import draw_exam
from eval.nano.frontier import BUDGETS, OURS, Model, show_kept, tokens_of
from eval.nano.losses import PERCENTS, kept_of, worst_of
from eval.nano.needs import by_things
from eval.nano.text import prompts
from llava_hivtp import load
from llava_hivtp.answer import answer
from llava_hivtp.merging import merge_dropped
from llava_hivtp.pruners import for_depth

torch.set_num_threads(1)
FOLDER = CHECKPOINTS / "unguided"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the command writes, of few questions."""
    out = tmp_path_factory.mktemp("ablation")
    arguments = ["ablation", "--out", str(out), "--number", "8", "--towers", "unguided"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return out


def test_budgets_are_met_on_the_tuning_pictures(folder):
    reaches = find_reaches(FOLDER, 8, folder / "unguided-8.reach.json")
    assert {p: round(reach.reached) for p, reach in reaches.items()} == BUDGETS
    model, items, tokens = Model(FOLDER), draw_exam("tune", 8), []
    pruner = for_depth(build_ablation(reaches)[row_of(FREE, 11)], model.depth)
    for start in range(0, len(items), 40):
        tokens.append(len(pruner.select(model.see([i.picture.image for i in items[start:][:40]]))))
    assert sum(tokens) / len(items) == pytest.approx(reaches[11].reached, abs=0.05)


ASKED = [(PLACED, OURS), (BOTH, OURS), (FREE, OURS), (BOTH, "hivtp"), (BOTH, "divprune")]


@pytest.mark.parametrize(("variant", "name"), ASKED)
def test_the_exam_answers_as_the_model_does(variant, name, folder):
    """Ragged, weighed, in their places: one padded pass and generation by itself agree."""
    reaches = find_reaches(FOLDER, 8, folder / "unguided-8.reach.json")
    method = for_depth(build_ablation(reaches)[row_of(variant, 11, name)], 8)
    items, placed = draw_exam("report", 8)[3::8], variant in (PLACED, BOTH)
    exam = Model(FOLDER)
    seen = exam.see([item.picture.image for item in items])
    kept = method.select(seen)
    kept = merge_dropped(kept, seen, True) if method.weigh else kept
    pictures = kept.split([1] * len(items))
    right = exam.right(show_kept(pictures, method.weigh, placed), items)
    model, tokenizer, *_ = load(str(FOLDER), method, positions="kept" if placed else "packed")
    said = []
    for item in items:
        question = prompts(item.question)[-1 if item.set == "mmbench" else 0]
        found = answer(model, tokenizer, item.picture.image, question, max_new_tokens=8)
        said.append(int(found.text == item.question.answer))
    assert right == said
    assert 0 < sum(right) < len(items)


def test_the_report_says_what_each_part_adds_and_what_was_kept(folder):
    text = (folder / "frontier-ablation.md").read_text()
    assert "over the 48 comparisons" in text  # 4 variants and 2 others, 4 budgets, 2 parts
    assert all(f"| {v}, minus cover |" in text for v in (PLACED, BOTH, FREE))
    assert text.count("| cover, both, minus divprune, both |") == 2
    assert text.count("| unguided | ") == 4
    losses = (folder / "frontier-losses.md").read_text()
    assert losses.count("| unguided | 6 % |") == 8
    assert "(frontier-losses.png)" in losses
    for name in ("frontier-tokens", "frontier-losses"):
        with Image.open(folder / f"{name}.png") as image:
            assert min(image.size) > 300


def test_it_goes_on_after_a_stop(folder):
    (file,) = folder.glob("unguided-8.jsonl")
    whole = file.read_text()
    file.write_text(whole.splitlines()[0] + "\n")
    (tower,) = ablate(folder, 8, ["unguided"])
    assert file.read_text() == whole
    counts = tower.right[tokens_of(row_of(FREE, 11))]
    assert len(set(counts)) > 3
    assert max(counts) <= 72
    with pytest.raises(ValueError, match="no such tower: tall; choose from nodrop"):
        ablate(folder, 8, ["tall"])


def test_a_picture_counts_once_by_the_things_in_it(folder):
    (tower,) = ablate(folder, 8, ["unguided"])
    every = {id(item.picture): things_in(item) for item in tower.items}
    found = by_things(tower, 11)
    assert all(len(each) == list(every.values()).count(n) >= 10 for n, each in found.items())


def test_what_is_kept_of_what_is_asked_about(folder):
    (tower,) = ablate(folder, 8, ["unguided"])
    few, many = kept_of("unguided", tower.items, ["cover-6", "cover-25"])
    assert len(few) == sum(item.patches().any() for item in tower.items) < len(tower.items)
    assert 0 < few.mean() < many.mean() <= 1
    assert worst_of([tower])[1] in PERCENTS
