"""The drawn world: its eight data sets, its questions, its prompts."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from eval.nano import questions as q
from eval.nano.datasets import build, write
from eval.nano.draw import SIDE, draw
from eval.nano.labels import ASPECTS, GRID, label
from eval.nano.text import build_tokenizer, encode, prefix_ids, prompts, unknown_words
from eval.nano.world import TEST_WORDS, TRAIN_WORDS

ROOT = Path(__file__).parents[1]
TASKS = "mme pope textvqa_val mmbench_en_dev_static scienceqa_img ocrbench gqa ai2d"
GOLD = """
import json, sys
from lmms_eval.api.model import lmms
from lmms_eval.evaluator import simple_evaluate
from eval.benchmarks.records import BENCHMARKS

class Gold(lmms):
    is_simple = True

    def generate_until(self, requests):
        return [self.answer(*r.args) for r in requests]

    def answer(self, context, _, visual, doc, task, split):
        doc = self.task_dict[task][split][doc]
        assert visual(doc)[0].mode == "RGB"
        self.prompts.append(context)
        return BENCHMARKS[task].gold(doc)

    loglikelihood = generate_until_multi_round = None

Gold.__abstractmethods__ = frozenset()
gold, scores = Gold(), {}
gold.prompts = []
for task in sys.argv[1].split():
    found = simple_evaluate(gold, tasks=[task], bootstrap_iters=0)["results"][task]
    scores[task] = {k: v for k, v in found.items() if isinstance(v, float)}
print("RESULT" + json.dumps([scores, gold.prompts]))
"""


@pytest.fixture(scope="module")
def gold(drawn, tmp_path_factory):
    """(scores, prompts) of right answers under lmms-eval's own tasks, run from the folder."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tmp_path_factory.mktemp("cache")),
    }
    command = [sys.executable, "-c", GOLD, TASKS]
    done = subprocess.run(command, cwd=drawn, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert lines, done.stderr[-2000:]
    return json.loads(lines[0].removeprefix("RESULT"))


def asked(size="quick", **options):
    """(set, question, answer) of every row that asks."""
    found = []
    for split in build(size, **options):
        for row in split.rows:
            if "answers" in row:
                found.append((split.repository, row["question"], row["answers"][0]))
            elif "answer" in row:
                found.append((split.repository, row["question"], str(row["answer"])))
    return found


def test_the_official_tasks_give_gold_answers_full_marks(gold):
    scores, _ = gold
    assert scores["mme"]["mme_perception_score,none"] == 200 * 5
    assert scores["pope"]["pope_accuracy,none"] == 1
    assert scores["pope"]["pope_yes_ratio,none"] == 0.5
    assert scores["mmbench_en_dev_static"]["gpt_eval_score,none"] == 100
    assert scores["ocrbench"]["ocrbench_accuracy,none"] == 40 / 1000  # points of 1000, always
    for task in ("textvqa_val", "scienceqa_img", "gqa"):
        assert scores[task]["exact_match,none"] == 1
    assert scores["ai2d"]["exact_match,flexible-extract"] == 1


def test_the_official_prompts_are_those_the_model_was_trained_on(gold):
    _, official = gold
    assert not {word for prompt in official for word in unknown_words(prompt)}
    rng, known = random.Random(0), set()
    for kind in q.FAMILIES:
        for _ in range(300):
            for question in q.ask(rng, draw(rng, kind), kind, 6):
                known |= {_form(prompt) for prompt in prompts(question)}
    assert not {_form(prompt) for prompt in official} - known


def _form(prompt):
    """A prompt with everything replaced that names something in a picture."""
    from eval.nano.world import COLORS, NUMBERS, SHAPES, plural

    named = {*SHAPES, *map(plural, SHAPES), *COLORS, *NUMBERS, "an", "top", "bottom"}
    named |= {"left", "right", "above", "below", "floats", "sinks"}
    words = prompt.replace('"', " ").replace("?", " ?").split()
    return " ".join(
        "_" if word in named or (word.isupper() and word.isalnum()) else word for word in words
    )


def test_every_set_has_the_size_it_promises():
    counts = Counter(name.split("/")[1] for name, *_ in asked())
    assert set(counts.values()) <= {40, 42}
    assert len(counts) == 8


def test_the_same_seed_draws_the_same_data(drawn, tmp_path):
    again = write(tmp_path / "again", "quick", further=True)
    for path in sorted(drawn.rglob("*.parquet")):
        assert path.read_bytes() == (again / path.relative_to(drawn)).read_bytes()


def test_an_unknown_size_is_refused():
    with pytest.raises(ValueError, match="quick, full"):
        build("small")


def test_hidden_pictures_keep_their_questions():
    assert asked() == asked(blank=True)
    (split,) = [s for s in build("quick", blank=True) if "POPE" in s.repository]
    assert len({row["image"].tobytes() for row in split.rows}) == 1


def test_large_pictures_need_several_tiles():
    sizes = {row["image"].size for s in build("quick", "large") for row in s.rows if "image" in row}
    assert sizes >= {(288, 288), (288, 144), (144, 288)}


def test_no_set_can_be_answered_blind():
    """The best answer to each wording, learned on half of a set, fails on the other half."""
    for split in build("full"):
        if "question" not in split.rows[0]:
            continue
        best, hits, chances = defaultdict(Counter), [], []
        for i, row in enumerate(split.rows):
            answer = str(row.get("answers") or row["answer"]).lower()
            form = _form(row["question"])
            if i % 4 < 2:  # the questions of a pair stay together
                best[form][answer] += 1
                continue
            guess = best[form].most_common(1)
            hits.append(bool(guess) and guess[0][0] == answer)
            options = row.get("choices") or row.get("options") or ("ABCD" if "A" in row else None)
            chances.append(1 / len(options) if options else _CHANCE.get(answer, 1 / 8))
        share, chance = sum(hits) / len(hits), sum(chances) / len(chances)
        assert share < chance + 0.12, (split.repository, share, chance)


_CHANCE = {"yes": 1 / 2, "no": 1 / 2, "left": 1 / 2, "right": 1 / 2}


def test_words_on_signs_of_the_sets_are_not_trained_on():
    assert not set(TEST_WORDS) & set(TRAIN_WORDS)
    answers = {answer.upper() for name, _, answer in asked() if "textvqa" in name}
    assert not answers & set(TRAIN_WORDS)


@pytest.mark.parametrize("kind", [*q.FAMILIES, "dense"])
def test_labels_say_what_is_drawn(kind):
    rng = random.Random(kind)
    for _ in range(20):
        picture = draw(rng, kind)
        labels = label(picture)
        said = {a: {ASPECTS[a][i - 1] for i in v if i > 0} for a, v in labels.aspects.items()}
        assert said["shape"] == {t.name for t in picture.shapes}
        assert said["color"] == {t.color for t in [*picture.shapes, *picture.boxes]}
        assert all(v.shape == (GRID**2,) for v in labels.aspects.values())
        drawn = {c if not place else q.CONTINUED + c for c, place, *_ in picture.letters}
        assert said["character"] == drawn


def test_an_unknown_kind_of_picture_is_refused():
    with pytest.raises(ValueError, match="choose scene"):
        draw(random.Random(0), "photo")


def test_hints_leave_the_tokens_alone():
    rng, tokenizer = random.Random(2), build_tokenizer()
    for kind in q.FAMILIES:
        for question in q.ask(rng, draw(rng, kind), kind, 8):
            for hinted, plain in zip(
                prompts(question, hinted=True), prompts(question), strict=True
            ):
                encoded = encode(question, hinted)
                text = f"{plain} ASSISTANT:"
                whole = tokenizer(text, add_special_tokens=False).input_ids
                assert encoded.ids[: len(whole)] == whole
                start, end = encoded.answer
                predicted = {at: token for at, token, _ in encoded.targets}
                answer = [predicted[i] for i in range(start, end)]
                assert tokenizer.decode(answer, skip_special_tokens=True) == question.answer


def test_prompts_are_llavas_own_template():
    conversation = pytest.importorskip("llava.conversation").conv_templates["vicuna_v1"].copy()
    conversation.append_message(conversation.roles[0], "<image>\nIs there a ring in the image?")
    conversation.append_message(conversation.roles[1], None)
    before, after = conversation.get_prompt().split("<image>")
    tokenizer = build_tokenizer()
    assert tokenizer(before).input_ids == prefix_ids()
    question = q.Question("existence", "Is there a ring in the image?", "No")
    ids = tokenizer(after, add_special_tokens=False).input_ids
    assert encode(question, question.text).ids[: len(ids)] == ids


def test_a_rotation_moves_the_right_option():
    question = q.Question("color", "What color is the star?", "B", tuple("wxyz"))
    turned = q.rotate(question, 1)
    assert turned.options == ("x", "y", "z", "w")
    assert turned.answer == "A"


def test_pictures_have_the_models_size():
    assert draw(random.Random(0), "scene").image.size == (SIDE, SIDE)
