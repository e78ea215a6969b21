"""Stand-ins for the data sets beside the paper's eight, in the columns of the official ones.

The embedded model was not trained on the wording of their tasks; they show that a task runs.
"""

from itertools import cycle, islice
from typing import Any

from PIL import Image

from eval.nano import questions as q
from eval.nano.studio import Row, Split, Studio
from eval.nano.world import SHAPES, Picture

_CHINESE = {
    "circle": "圆形", "square": "正方形", "triangle": "三角形", "star": "星形",
    "cross": "十字形", "ring": "环形", "diamond": "菱形", "heart": "心形",
    "red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色",
    "purple": "紫色", "orange": "橙色", "cyan": "青色", "white": "白色",
}  # fmt: skip


def _several(
    studio: Studio, *families: q.Family, kind: str = "scene"
) -> tuple[Picture, list[q.Question]]:
    """A picture about which a question of every family can be asked."""
    while True:
        picture = studio.picture(kind)
        questions = [family(studio.rng, picture, None) for family in families]
        if all(questions):
            return picture, questions


def vqav2(studio: Studio, number: int) -> list[Split]:
    """Two questions about each picture, ten answers each."""
    rows: list[Row] = []
    for i in range(number // 2):
        picture, questions = _several(studio, q.exists, q.color_of)
        for j, question in enumerate(questions):
            answer = question.answer.lower()
            people = [
                {"answer": answer, "answer_confidence": "yes", "answer_id": n} for n in range(1, 11)
            ]
            rows.append(
                {
                    "question_type": " ".join(question.text.split()[:2]).lower(),
                    "multiple_choice_answer": answer,
                    "answers": people,
                    "image_id": i,
                    "answer_type": "yes/no" if j == 0 else "other",
                    "question_id": 1000 * i + j,
                    "question": question.text,
                    "image": studio.image(picture),
                }
            )
    return [Split("lmms-lab-encoder/VQAv2", "default", "validation", rows)]


def vizwiz(studio: Studio, number: int) -> list[Split]:
    """Every other question asks about what is not there."""
    rows: list[Row] = []
    for i in range(number):
        picture, question = studio.ask("scene", q.color_of)
        text, answer = question.text, question.answer
        if i % 2:
            absent = [shape for shape in SHAPES if not picture.named(shape)]
            text, answer = f"What color is the {studio.rng.choice(absent)}?", "unanswerable"
        rows.append(
            {
                "question_id": f"VizWiz_val_{i:08d}",
                "image": studio.image(picture),
                "question": text,
                "answers": [answer] * 10,
                "category": "unanswerable" if i % 2 else "other",
            }
        )
    return [Split("lmms-lab-encoder/VizWiz-VQA", "default", "val", rows)]


def seedbench(studio: Studio, number: int) -> list[Split]:
    """Two questions about each image, and some about films, which the images' score leaves out."""
    rows: list[Row] = []
    for i in range(number // 2):
        picture, questions = _several(studio, q.color_choice, q.shape_choice)
        for question in questions:
            frames = [studio.image(picture)]
            rows.append(_seed_row(f"image_{i:06d}", "image", frames, question, len(rows)))
    for i in range(number // 10):
        picture, question = studio.ask("scene", q.where_choice)
        frames = [studio.image(picture)] * 8
        rows.append(_seed_row(f"film_{i}", "video", frames, question, len(rows)))
    return [Split("lmms-lab-encoder/SEED-Bench", "default", "test", rows)]


def _seed_row(
    name: str, kind: str, frames: list[Image.Image], question: q.Question, number: int
) -> Row:
    return {
        "answer": question.answer,
        **dict(
            zip(
                ("choice_a", "choice_b", "choice_c", "choice_d"),
                question.options,
                strict=True,
            )
        ),
        "data_id": name,
        "data_type": kind,
        "question": question.text,
        "question_id": str(number),
        "question_type_id": 1,
        "image": frames,
        "segment": [],
    }


def mmbench_cn(studio: Studio, number: int) -> list[Split]:
    """Four options in four circular turns, in Chinese."""
    rows: list[Row] = []
    for i in range(number // 4):
        picture, question = studio.ask("scene", q.color_choice)
        shape = question.text.rstrip("?").split()[-1]
        for turn in range(4):
            turned = q.rotate(question, turn)
            options = [_CHINESE[option] for option in turned.options]
            rows.append(
                {
                    "index": i + turn * 1_000_000,
                    "question": f"图中的{_CHINESE[shape]}是什么颜色?",
                    "hint": "nan",
                    "answer": turned.answer,
                    **dict(zip("ABCD", options, strict=True)),
                    "category": "attribute_recognition",
                    "source": "drawn",
                    "L2-category": "finegrained_perception (instance-level)",
                    "comment": "nan",
                    "split": "dev",
                    "image": studio.image(picture),
                }
            )
    return [Split("lmms-lab-encoder/MMBench", "cn", "dev", rows)]


def mmmu(studio: Studio, number: int) -> list[Split]:
    """Questions with options about one picture or two, and open ones."""
    subjects = ("Art", "Biology", "Computer_Science")
    rows: list[Row] = []
    for i, kind in enumerate(islice(cycle(("choice", "open", "two")), number)):
        if kind == "open":
            picture, question = studio.ask("sign", q.read)
            asked: dict[str, Any] = {"question_type": "open", "options": "[]"}
        else:
            picture, question = studio.ask("diagram", q.box_choice)
            asked = {"question_type": "multiple-choice", "options": str(list(question.options))}
        images: dict[str, Any] = {f"image_{n}": None for n in range(1, 8)}
        images["image_1"] = studio.image(picture)
        text = f"<image 1> {question.text}"
        if kind == "two":
            images["image_2"] = studio.image(studio.picture("scene"))
            text += " Not in <image 2>."
        subject = subjects[i % len(subjects)]
        rows.append(
            {
                "id": f"validation_{subject}_{i}",
                "question": text,
                **asked,
                "explanation": "",
                **images,
                "img_type": "['Drawings']",
                "answer": question.answer,
                "topic_difficulty": "Easy",
                "subfield": subject,
            }
        )
    return [Split("lmms-lab-encoder/MMMU", "default", "validation", rows)]


def refcoco(studio: Studio, number: int) -> list[Split]:
    """Two objects of each picture, two expressions each; boxes are x, y, width, height."""
    return [
        Split("lmms-lab-encoder/RefCOCO", "default", split, _referred(studio, number, split))
        for split in ("testA", "testB")
    ]


def _referred(studio: Studio, number: int, split: str) -> list[Row]:
    rows: list[Row] = []
    while len(rows) < number // 2:
        picture = studio.picture("scene")
        single = picture.single()
        if len(single) < 2:
            continue
        for thing in studio.rng.sample(single, 2):
            left, top, right, bottom = _box(picture, picture.shapes.index(thing))
            rows.append(
                {
                    "question_id": f"{split}_{len(rows)}",
                    "image": studio.image(picture),
                    "question": "What is in the box?",
                    "answer": [f"the {thing.name}", f"the {thing.color} {thing.name}"],
                    "segmentation": [left, top, right, top, right, bottom, left, bottom],
                    "bbox": [left, top, right - left, bottom - top],
                    "iscrowd": 0,
                    "file_name": f"COCO_train2014_{len(rows) // 2:012d}_{len(rows)}.jpg",
                }
            )
    return rows


def _box(picture: Picture, index: int) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of what is to be seen of a shape."""
    ink = picture.ink.point([255 * (value == index + 1) for value in range(256)])
    left, top, right, bottom = map(float, ink.getbbox())
    return left, top, right, bottom


FURTHER_SETS = (vqav2, vizwiz, seedbench, mmbench_cn, mmmu, refcoco)
