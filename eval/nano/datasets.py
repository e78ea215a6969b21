"""Eight small data sets in the columns, wording and layout of the official ones.

The folder mirrors the names of the hub, so that the tasks of lmms-eval run untouched from inside
it: `load_dataset("lmms-lab-encoder/POPE")` prefers a directory of that relative name.
"""

import io
import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from PIL import Image

from eval.nano import questions as q
from eval.nano.draw import SIDE, draw, draw_large, large_size, random_string
from eval.nano.world import TEST_WORDS, Picture

SIZES = {"quick": 40, "full": 400}  # questions per set, about
# OCRBench's score is points out of 1000 whatever the number of rows: only 1000 rows read as one.
OCRBENCH_FULL = 1000

Row = dict[str, Any]


@dataclass(frozen=True)
class Split:
    """One parquet file: where it lies, and the rows in it."""

    repository: str
    config: str
    split: str
    rows: list[Row]


class Studio:
    """Draws pictures one after the other, small or large, or nothing but background."""

    def __init__(self, seed: int, images: str = "small", blank: bool = False) -> None:
        if images not in ("small", "large"):
            raise ValueError(f"images must be small or large, got {images!r}")
        self.rng, self.images, self.blank = random.Random(seed), images, blank

    def picture(self, kind: str, **options: Any) -> Picture:
        """Draw a picture of the next seed."""
        if self.images == "small":
            return draw(self.rng, kind, words=TEST_WORDS, **options)
        size = large_size(self.rng, kind)
        return draw_large(self.rng, kind, size, words=TEST_WORDS, **options)

    def image(self, picture: Picture) -> Image.Image:
        if not self.blank:
            return picture.image
        # A generator of its own: the pictures that follow must not change.
        return draw(random.Random(0), "blank", picture.image.size).image

    def ask(
        self, kind: str, family: q.Family, want: q.Want = None, **options: Any
    ) -> tuple[Picture, q.Question]:
        """Draw until the picture suits the question."""
        while True:
            picture = self.picture(kind, **options)
            question = family(self.rng, picture, want)
            if question:
                return picture, question

    def counted(self) -> dict[str, int]:
        return {"repeat": self.rng.randint(1, 4)}


def build(size: str, images: str = "small", blank: bool = False) -> list[Split]:
    """Draw all eight sets; `blank` hides every picture and keeps every question."""
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    number = SIZES[size]
    splits = []
    for seed, make in enumerate(_SETS):
        studio = Studio(9000 + 10 * seed + (size == "full"), images, blank)
        rows = OCRBENCH_FULL if make is ocrbench and size == "full" else number
        splits += make(studio, rows)
    return splits


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
                return picture, (yes, no)


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


_SETS: tuple[Callable[[Studio, int], list[Split]], ...] = (
    mme, pope, textvqa, mmbench, scienceqa, ocrbench, gqa, ai2d,
)  # fmt: skip


def write(out: Path, size: str, images: str = "small", blank: bool = False) -> Path:
    """Write the folder from which lmms-eval runs; an existing one of the same kind is kept."""
    stamp = f"{size} {images}{' blank' if blank else ''}\n"
    done = out / "COMPLETE"
    if done.is_file() and done.read_text() == stamp:
        return out
    splits = build(size, images, blank)
    for split in splits:
        _write_parquet(out, split)
    for repository in {s.repository for s in splits}:
        _write_card(out / repository, [s for s in splits if s.repository == repository])
    done.write_text(stamp)
    return out


def _file(split: Split) -> str:
    folder = "data" if split.config == "default" else split.config
    return f"{folder}/{split.split}-00000-of-00001.parquet"


def _write_parquet(out: Path, split: Split) -> None:
    import datasets

    path = out / split.repository / _file(split)
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {key: [row[key] for row in split.rows] for key in split.rows[0]}
    if "image" in columns:
        columns["image"] = [{"bytes": _png(i), "path": None} for i in columns["image"]]
    table = datasets.Dataset.from_dict(columns)
    if "image" in columns:
        table = table.cast_column("image", datasets.Image())
    table.to_parquet(str(path))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png", compress_level=1)
    return buffer.getvalue()


def _write_card(folder: Path, splits: list[Split]) -> None:
    """The front matter tells `load_dataset` which files make up which configuration."""
    lines = ["---", "configs:"]
    for split in splits:
        lines += [
            f"- config_name: {split.config}",
            "  data_files:",
            f"  - split: {split.split}",
            f"    path: {_file(split)}",
        ]
    text = (
        f"\nDrawn stand-in for `{splits[0].repository}`: {len(splits[0].rows)} questions about "
        f"pictures of about {SIDE} pixels, made by `python -m eval.nano data`. "
        "Nothing of the original data set is in it.\n"
    )
    (folder / "README.md").write_text("\n".join([*lines, "---"]) + "\n" + text)
