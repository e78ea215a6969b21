"""One place prepares, generates, counts and times: the answer of a question."""

from __future__ import annotations

import math
import os
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from llava_hivtp import answer as module
from llava_hivtp import attach, build_pruner
from llava_hivtp.answer import answer
from llava_hivtp.images import open_image


@pytest.fixture
def ask(loaded, photo):
    def ask(question="What?", kind="v15", image=None, **options):
        model, tokenizer, _ = loaded(kind)
        attach(model, build_pruner("hivtp", k=14, c=3))
        image = photo((200, 150)) if image is None else image
        return answer(model, tokenizer, image, question, **options)

    return ask


def test_an_answer_counts_tokens_and_says_its_times(ask, loaded, photo):
    found = ask(max_new_tokens=7)
    (kept,) = loaded("v15")[0].kept
    assert (found.patches, found.newlines, found.total) == (kept.patches, 0, 576)
    assert 0 < found.generated <= 7
    assert 0 < found.ttft <= found.seconds
    assert found.preparation > 0
    next_found = ask(kind="next", image=photo((640, 480)), max_new_tokens=2)
    (kept,) = loaded("next")[0].kept
    assert (next_found.patches, next_found.newlines) == (kept.patches, kept.newlines)


def test_the_clock_starts_when_pixels_are_prepared(ask, monkeypatch):
    prepare = module.prepare_images

    def slow(*arguments):
        time.sleep(3)
        return prepare(*arguments)

    monkeypatch.setattr(module, "prepare_images", slow)
    found = ask(max_new_tokens=1)
    assert found.preparation > 3 > found.seconds >= found.ttft


@pytest.mark.parametrize("kind", ["v15", "next"])
def test_a_batch_answers_and_counts_as_single_questions(loaded, photo, kind):
    model, tokenizer, _ = loaded(kind)
    attach(model, build_pruner("hivtp", k=14, c=3))
    images = [photo((200, 150)), photo((90, 300), 1)]
    asked = [
        module.Request(q, {"max_new_tokens": 4}, (i,)) for q, i in zip("ab", images, strict=True)
    ]
    together = module.answer_batch(model, tokenizer, asked, "vicuna_v1")
    assert together == [
        module.answer_batch(model, tokenizer, [one], "vicuna_v1")[0] for one in asked
    ]
    assert together[0].ttft is None
    one = answer(model, tokenizer, images[0], "a", template="vicuna_v1", max_new_tokens=4)
    assert (one.text, one.generated) == (together[0].text.strip(), together[0].generated)
    other = [asked[0], module.Request("b", {"max_new_tokens": 5}, (images[1],))]
    with pytest.raises(ValueError, match="a batch shares its options"):
        module.answer_batch(model, tokenizer, other, "vicuna_v1")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "weight", ["model.mm_projector.2.bias", "model.norm.weight", "lm_head.weight"]
)
def test_logits_that_are_no_numbers_fail_the_question(ask, loaded, weight, value):
    broken = dict(loaded("v15")[0].named_parameters())[weight]
    before = broken.detach().clone()
    with torch.no_grad():
        for row, sign in zip(broken.view(-1, broken.shape[-1]), (1, -1), strict=False):
            row[3] = sign * value  # of two tokens one has the highest logit
    try:
        with pytest.raises(ValueError, match="gives NaN or infinity for question 0 of 1 .'What'"):
            ask("What", max_new_tokens=3)
    finally:
        with torch.no_grad():
            broken.copy_(before)
    assert ask("What", max_new_tokens=3)


@pytest.mark.parametrize(
    ("question", "options", "error", "message"),
    [
        (None, {}, TypeError, "a question is text, got None"),
        (5, {}, TypeError, "a question is text, got 5"),
        ("What?", {"max_new_tokens": 0}, ValueError, "max_new_tokens must be a whole number from"),
        ("What?", {"max_new_tokens": True}, ValueError, "max_new_tokens must be .* got True"),
        ("What?", {"max_new_tokens": "9"}, ValueError, "max_new_tokens must be .* got '9'"),
        ("What?", {"image": np.zeros((8, 8, 3), np.uint8)}, TypeError, "path or an open file, got"),
        ("What?", {"image": 5}, TypeError, "an image is a path or an open file, got int"),
        ("What?", {"template": "vicuna_v9"}, ValueError, "unknown conv_template 'vicuna_v9'"),
        ("<image> or <image>?", {}, ValueError, "2 marks <image> for 1 images"),
    ],
)
def test_a_question_that_is_none_is_refused_by_name(ask, question, options, error, message):
    with pytest.raises(error, match=message):
        ask(question, **options)


def test_a_pipe_or_a_device_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    found = []

    def attempt():
        for path in (tmp_path / "pipe.png", "/dev/zero"):
            try:
                open_image(path)
            except ValueError as error:
                found.append(str(error))

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(20)
    assert found == [f"{tmp_path / 'pipe.png'} is no regular file", "/dev/zero is no regular file"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"side": 0}, "side"), ({"side": 1.5}, "side"), ({"aspect": 0.5}, "aspect")],
)
def test_limits_are_numbers(settings, message):
    from llava_hivtp.limits import Limits

    with pytest.raises(ValueError, match=f"{message} must be a"):
        Limits(**settings)


def test_an_answer_holds_the_limits_it_is_given(ask):
    from llava_hivtp.limits import Limits

    with pytest.raises(ValueError, match="image 0 is 200 x 150 pixels; at most 100 a side"):
        ask(limits=Limits(side=100))


def test_an_image_of_no_pixels_is_refused(ask):
    with pytest.raises(ValueError, match="image 0 is 0 x 5 pixels: there is nothing to see"):
        ask(image=Image.new("RGB", (0, 5)))
