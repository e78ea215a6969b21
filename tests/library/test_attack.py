"""Whatever is handed over is either right or refused with an error that says why.

Values of every kind are drawn for every field of every method, for the inputs of the model and of
`answer`, and for what `attach` takes: the seed is fixed, so a case that fails can be run again.
"""

from __future__ import annotations

import linecache
import math
import random
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from ask import prompt_ids
from PIL import Image

from llava_hivtp import PRUNERS, attach, build_pruner, load
from llava_hivtp.answer import answer
from llava_hivtp.pruners import Pruner

HERE = str(Path(__file__).parents[2])
OURS = (ValueError, TypeError, FileNotFoundError)
NUMBERS = [0, 1, -1, 2, 3, 7, 24, 5000, 2**70, 0.0, 0.25, 0.5, 1.0, -0.5, 1e-300, 1e300]
NOT_NUMBERS = [math.nan, math.inf, -math.inf, 1j]
WORDS = [
    "",
    " ",
    "no",
    "yes",
    "off",
    "true",
    "None",
    "nan",
    "7+8",
    "7+7",
    "a" * 5000,
    "\x00",
    "[[[",
]
THINGS = [None, True, False, [], (), [7, 8], (7, 7), (7.5,), {}, {"k": 1}, {7}, b"7", object(), int]
ARRAYS = [np.int64(2), np.float32(0.5), np.zeros(3), torch.tensor(2), torch.tensor([7, 8])]
VALUES = [*NUMBERS, *NOT_NUMBERS, *WORDS, *THINGS, *ARRAYS]


def attempt(call):
    """What a call returns, or None if a line of ours refused it."""
    try:
        return call()
    except OURS as error:
        found = error
    trace = found.__traceback__
    while trace.tb_next:
        trace = trace.tb_next
    file, line = trace.tb_frame.f_code.co_filename, trace.tb_lineno
    assert file.startswith(f"{HERE}/llava_hivtp"), f"{found!r:.300} from {file}"
    assert "raise" in linecache.getline(file, line), f"{found!r:.300} from {file}:{line}"
    assert str(found).strip()
    return None


def is_what_it_says(pruner):
    """Every field of a method has the type of its annotation."""
    kinds = {"bool": bool, "int": int, "float": (int, float), "str": str}
    for field in fields(pruner):
        value, kind = getattr(pruner, field.name), kinds.get(field.type)
        if kind:
            assert isinstance(value, kind), (pruner, field.name)
            assert kind is bool or not isinstance(value, bool), (pruner, field.name)
        if field.name == "layers":
            assert isinstance(value, tuple), pruner
            assert all(type(layer) is int for layer in value), pruner
            assert len(set(value)) == len(value), pruner


def test_no_field_of_a_method_takes_what_it_is_not():
    rng, taken = random.Random(1), 0
    for _ in range(6000):
        name = rng.choice([*PRUNERS, "hivpt"])
        known = [field.name for field in fields(PRUNERS[name])] if name in PRUNERS else []
        keys = rng.sample([*known, "ratio", "name"], k=rng.randint(1, min(3, len(known) + 1)))
        arguments = {key: rng.choice(VALUES) for key in keys}
        pruner = attempt(lambda name=name, arguments=arguments: build_pruner(name, **arguments))
        if pruner is not None:
            taken += 1
            is_what_it_says(pruner)
            attempt(lambda pruner=pruner: pruner.check(rng.choice([4, 12, 24]), 576))
    assert taken > 100


def test_no_name_of_a_method_is_taken_for_another():
    for name in [
        *VALUES,
        "a:b",
        "os:path",
        "os.path:join",
        "x.py:Y",
        ":",
        "::",
        "a/b.py:",
        "..:..",
    ]:
        try:
            known = name in PRUNERS
        except TypeError:
            known = False
        assert known or attempt(lambda name=name: build_pruner(name)) is None


def test_a_field_changed_in_use_is_refused_or_used(loaded, photo):
    rng, (model, *_) = random.Random(2), loaded("v15")
    pixels = torch.zeros(1, 3, 336, 336)
    for _ in range(300):
        pruner = build_pruner(rng.choice(list(PRUNERS)))
        attach(model, pruner)
        field = rng.choice([field.name for field in fields(pruner)])
        setattr(pruner, field, rng.choice([v for v in VALUES if not isinstance(v, str) or v]))
        try:
            pruner.check(24, 576)
        except OURS:
            assert attempt(lambda: model.encode_images(pixels)) is None
    attach(model)


def test_attach_takes_methods_and_layouts_only(loaded):
    rng, (model, *_) = random.Random(3), loaded("v15")
    attach(model)
    for _ in range(300):
        pruner = rng.choice([*VALUES, *PRUNERS, "hivpt", Pruner, PRUNERS["hivtp"]])
        layout = rng.choice([*VALUES, "unpad", "mosaic", "rows"])
        if attempt(lambda p=pruner, w=layout: attach(model, p, w)) is not None:
            assert isinstance(pruner, (str, Pruner))
            assert pruner in PRUNERS
            assert layout in ("unpad", "mosaic")
        attempt(lambda p=pruner: setattr(model, "pruner", p))
        assert isinstance(model.pruner, Pruner)
    for thing in VALUES:
        assert attempt(lambda thing=thing: attach(thing)) is None
    attach(model)


PIXELS = torch.zeros(1, 5, 3, 336, 336)
IMAGES = [
    *(PIXELS.to(dtype) for dtype in (torch.uint8, torch.int64, torch.bool, torch.complex64)),
    PIXELS[0, 0, 0], PIXELS[:, :0], PIXELS[:0], PIXELS[:, :, :2], PIXELS[None],
    PIXELS.numpy(), [PIXELS[0].numpy()], [None], [PIXELS[0], None], ["photo.jpg"],
    Image.new("RGB", (8, 8)), [Image.new("RGB", (8, 8))],
]  # fmt: skip
SIZES = [(0, 480), (640, 0), (-640, 480), (math.nan, 480), (640, math.inf), (640,), (640, 480, 3)]


def test_inputs_of_the_model_are_refused_before_it_runs(loaded):
    rng, (model, tokenizer, _) = random.Random(4), loaded("next")
    attach(model)
    prompts = [prompt_ids(tokenizer, text)[0] for text in ("<image> What?", "What?")]
    ran = model.get_vision_tower().vision_tower.register_forward_pre_hook(
        lambda *_: pytest.fail("the tower ran on what it should not have seen")
    )
    try:
        for _ in range(400):
            images, sizes, ids = PIXELS, [(640, 480)], prompts[0]
            match rng.randrange(3):
                case 0:
                    images = rng.choice([*IMAGES, *(v for v in VALUES if v is not None)])
                case 1:
                    wrong = [s for s in VALUES if not isinstance(s, torch.Tensor) or s.ndim]
                    sizes = rng.choice([[s] for s in [*SIZES, *wrong]] + [None, [], "ab", 640])
                case _:
                    images, ids = rng.choice([(None, prompts[0]), (PIXELS, prompts[1])])
            call = {"images": images, "image_sizes": sizes, "max_new_tokens": 1}
            assert attempt(lambda ids=ids, call=call: model.generate(ids, **call)) is None
    finally:
        ran.remove()


def test_answer_takes_an_image_and_a_question_only(loaded, tmp_path):
    rng, (model, tokenizer, _) = random.Random(5), loaded("v15")
    attach(model)
    good = Image.new("RGB", (8, 8))
    (tmp_path / "note.png").write_text("no image")
    images = [*(v for v in VALUES), str(tmp_path / "note.png"), tmp_path, "/dev/null", [good]]
    images += [Image.new("RGB", size) for size in [(0, 5), (5, 0), (1, 900), (20000, 200)]]
    for _ in range(300):
        image, question, options = good, "What?", {"max_new_tokens": 1}
        match rng.randrange(4):
            case 0:
                image = rng.choice(images)
            case 1:
                question = rng.choice(
                    ["<image> <image>", *(v for v in VALUES if type(v) is not str)]
                )
            case 2:
                wrong = [v for v in VALUES if type(v) is not int or v < 1]
                options = {"max_new_tokens": rng.choice(wrong)}
            case _:
                options["template"] = rng.choice([v for v in VALUES if v is not None])
        ask = lambda i=image, q=question, o=options: answer(model, tokenizer, i, q, **o)  # noqa: E731
        assert attempt(ask) is None


def test_limits_and_paths_are_what_they_should_be():
    from llava_hivtp.limits import Limits

    for value in VALUES:
        limits = attempt(lambda value=value: Limits(side=value))
        assert limits is None or (type(value) is int and value >= 1)
        limits = attempt(lambda value=value: Limits(aspect=value))
        assert limits is None or (isinstance(value, (int, float)) and value >= 1)
        assert attempt(lambda value=value: load(value)) is None
