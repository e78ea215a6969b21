"""Stand-ins for the paper's eight data sets, in the columns and wording of the official ones."""

import random
import string
from collections.abc import Callable
from itertools import cycle, islice

from eval.nano import questions as q
from eval.nano.draw import random_string
from eval.nano.studio import Split, Studio
from eval.nano.world import TEST_WORDS, Picture


def mme(studio: Studio, number: int) -> list[Split]:
    """Pairs of a yes and a no question about one picture, in five categories."""
    families: list[tuple[str, str, list[q.Family]]] = [
        ("existence", "scene", [q.exists]),
        ("count", "scene", [q.count]),
        ("position", "scene", [q.side_is, q.relation_is]),
        ("color", "scene", [q.color_is]),
        ("OCR", "sign", [_test_word_is]),
    ]
    rows = []
    for i, (category, kind, choices) in zip(range(number // 2), cycle(families), strict=False):
        family = choices[i // len(families) % len(choices)]
        picture, pair = _pair(studio, kind, family)
        for question in pair:
            rows.append(
                {
                    "question_id": f"{category}/{i:04d}.png",
                    "image": studio.image(picture),
                    "question": f"{question.text} Please answer yes or no.",
                    "answer": question.answer,
                    "category": category,
                }
            )
    return [Split("lmms-lab-encoder/MME", "default", "test", rows)]


def _pair(
    studio: Studio, kind: str, family: q.Family
) -> tuple[Picture, tuple[q.Question, q.Question]]:
    while True:
        options = studio.counted() if family is q.count else {}
        picture, yes = studio.ask(kind, family, True, **options)
        for _ in range(20):  # a family may choose a subject that has no wrong answer
            no = family(studio.rng, picture, False)
            if no:
                studio.asked.append((picture, no))
                return picture, (yes, no)
        studio.asked.pop()


def _test_word_is(rng: random.Random, picture: Picture, want: q.Want = None) -> q.Question | None:
    return q.word_is(rng, picture, want, TEST_WORDS)


def pope(studio: Studio, number: int) -> list[Split]:
    """Existence under three kinds of absence; half of the answers are yes in each."""
    kinds: list[tuple[str, q.Family]] = [
        ("adversarial", q.exists_pair),  # its colour and its shape are there, apart
        ("popular", q.exists_color),  # its colour is there
        ("random", q.exists),
    ]
    rows = []
    for i in range(-(-number // 6) * 6):
        category, family = kinds[i % 3]
        picture, question = studio.ask("scene", family, i // 3 % 2 == 0)
        rows.append(
            {
                "id": str(i),
                "question_id": str(i),
                "question": question.text,
                "answer": question.answer.lower(),
                "image_source": f"drawn_{i:06d}",
                "image": studio.image(picture),
                "category": category,
            }
        )
    return [Split("lmms-lab-encoder/POPE", "default", "test", rows)]


def textvqa(studio: Studio, number: int) -> list[Split]:
    rows = []
    for i in range(number):
        picture, question = studio.ask("sign", q.read)
        rows.append(
            {
                "image_id": f"drawn_{i:06d}",
                "question_id": i,
                "question": question.text,
                "image": studio.image(picture),
                "image_width": picture.image.width,
                "image_height": picture.image.height,
                "answers": [question.answer.lower()] * 10,
                "ocr_tokens": [],
                "set_name": "val",
            }
        )
    return [Split("lmms-lab-encoder/textvqa", "default", "validation", rows)]


def mmbench(studio: Studio, number: int) -> list[Split]:
    """Four options in four circular turns: a question counts only if every turn is right."""
    families: list[tuple[str, str, q.Family]] = [
        ("attribute_recognition", "finegrained_perception (instance-level)", q.color_choice),
        ("object_localization", "finegrained_perception (instance-level)", q.where_choice),
        ("attribute_recognition", "finegrained_perception (instance-level)", q.shape_choice),
        ("counting", "finegrained_perception (cross-instance)", q.how_many),
    ]
    rows = []
    for i, (category, level, family) in zip(range(number // 4), cycle(families), strict=False):
        options = studio.counted() if family is q.how_many else {}
        picture, question = studio.ask("scene", family, **options)
        for turn in range(4):
            turned = q.rotate(question, turn)
            rows.append(
                {
                    "index": i + turn * 1_000_000,
                    "question": turned.text,
                    "hint": "nan",
                    "answer": turned.answer,
                    **dict(zip("ABCD", turned.options, strict=True)),
                    "category": category,
                    "source": "drawn",
                    "L2-category": level,
                    "comment": "nan",
                    "split": "dev",
                    "image": studio.image(picture),
                }
            )
    return [Split("lmms-lab-encoder/MMBench", "en", "dev", rows)]


def scienceqa(studio: Studio, number: int) -> list[Split]:
    families = [
        ("scene", q.float_choice), ("diagram", q.box_choice), ("scene", q.present_choice),
    ]  # fmt: skip
    rows = []
    for kind, family in islice(cycle(families), number):
        picture, question = studio.ask(kind, family)
        rows.append(
            {
                "image": studio.image(picture),
                "question": question.text,
                "choices": list(question.options),
                "answer": "ABCD".index(question.answer),
                "hint": question.context,
                "task": "closed choice",
                "grade": "grade2",
                "subject": "natural science",
                "topic": "physics",
                "category": question.family,
                "skill": question.family,
                "lecture": "",
                "solution": "",
            }
        )
    return [Split("lmms-lab-encoder/ScienceQA", "ScienceQA-IMG", "test", rows)]


def ocrbench(studio: Studio, number: int) -> list[Split]:
    """Words, numbers and strings without a meaning."""
    kinds: list[tuple[str, Callable[[random.Random], str]]] = [
        ("Regular Text Recognition", lambda rng: rng.choice(TEST_WORDS)),
        ("Digit String Recognition", lambda rng: random_string(rng, string.digits)),
        ("Non-Semantic Text Recognition", random_string),
    ]
    rows = []
    for kind, text in islice(cycle(kinds), number):
        picture, question = studio.ask("sign", q.read_bare, text=text(studio.rng))
        rows.append(
            {
                "dataset": "drawn",
                "question": question.text,
                "question_type": kind,
                "answer": [question.answer],
                "image": studio.image(picture),
            }
        )
    return [Split("echo840/OCRBench", "default", "test", rows)]


def gqa(studio: Studio, number: int) -> list[Split]:
    """Open questions; instructions and images lie in two configurations, as in the original."""
    families: list[tuple[q.Family, q.Want]] = [
        (q.color_of, None), (q.shape_of, None), (q.side_of, None), (q.relation_of, None),
        (q.relation_is, True), (q.exists_pair, False), (q.relation_is, False),
        (q.exists_pair, True),
    ]  # fmt: skip
    instructions, images = [], []
    for i, (family, want) in zip(range(number), cycle(families), strict=False):
        picture, question = studio.ask("scene", family, want)
        name = f"n{i:06d}"
        images.append({"id": name, "image": studio.image(picture)})
        instructions.append(
            {
                "id": f"{i:08d}",
                "imageId": name,
                "question": question.text,
                "isBalanced": True,
                "answer": question.answer.lower(),
                "fullAnswer": f"{question.answer}.",
                "types": {"semantic": question.family, "structural": "query"},
            }
        )
    repository = "lmms-lab-encoder/GQA"
    return [
        Split(repository, "testdev_balanced_instructions", "testdev", instructions),
        Split(repository, "testdev_balanced_images", "testdev", images),
    ]


def ai2d(studio: Studio, number: int) -> list[Split]:
    families = (q.arrow_choice, q.letter_choice, q.box_color_choice)
    rows = []
    for family in islice(cycle(families), number):
        picture, question = studio.ask("diagram", family)
        rows.append(
            {
                "question": question.text,
                "options": list(question.options),
                "answer": str("ABCD".index(question.answer)),
                "image": studio.image(picture),
            }
        )
    return [Split("lmms-lab-encoder/ai2d", "default", "test", rows)]


PAPER_SETS = (mme, pope, textvqa, mmbench, scienceqa, ocrbench, gqa, ai2d)
