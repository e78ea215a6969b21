"""Methods that ask get the question of their image's row, and nobody else's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from ask import generate, prompt_ids
from llava.constants import IMAGE_TOKEN_INDEX

from llava_hivtp import attach, build_pruner, load
from llava_hivtp.images import prepare_images
from llava_hivtp.pruners import Pruner

ASK = [
    "USER: <image>\nWhat? ASSISTANT:",
    "USER: <image>\nWhich colour has it? ASSISTANT:",
    "USER: Look. <image> or <image>\nWhich? ASSISTANT:",
    "What is to be seen here?<image>",
]
HEARD = ["\nWhat? ASSISTANT:", "\nWhich colour has it? ASSISTANT:", "\nWhich? ASSISTANT:"]
TEXT = "USER: Hello ASSISTANT:"


@dataclass
class Listener(Pruner):
    heard: list = field(default_factory=list)

    asks: ClassVar[bool] = True

    def select(self, features):
        self.heard.append(features.question)
        return super().select(features)


@pytest.fixture
def listening(loaded):
    def get(kind):
        model, *rest = loaded(kind)
        return attach(model, Listener()), *rest

    return get


def heard(llava):
    """What the listener was told, as texts."""
    model, tokenizer, _ = llava
    table = model.get_input_embeddings().weight
    words = []
    for question in model.pruner.heard:
        ids = torch.cdist(question, table).argmin(1)
        assert torch.equal(table[ids], question)
        words.append(tokenizer.decode(ids))
    model.pruner.heard.clear()
    return words


@pytest.mark.parametrize("kind", ["v15", "next", "mistral"])
def test_every_image_hears_the_question_of_its_row(listening, photo, kind):
    llava = listening(kind)
    images = [photo((90, 50), i) for i in range(4)]
    generate(*llava, images, *ASK[:3], max_new_tokens=1)
    assert heard(llava) == [HEARD[0], HEARD[1], HEARD[2], HEARD[2]]
    generate(*llava, images[:2], ASK[1], ASK[0], max_new_tokens=3)  # once, not at every token
    assert heard(llava) == [HEARD[1], HEARD[0]]


def test_padding_on_either_side_is_no_question(listening, photo):
    model, tokenizer, processor = listening("v15")
    pixels, _ = prepare_images([photo((90, 50)), photo((50, 90))], processor, model.config)
    ids, mask = prompt_ids(tokenizer, *ASK[:2])
    model.generate(ids, images=pixels, attention_mask=mask, max_new_tokens=1)
    assert heard((model, tokenizer, None)) == HEARD[:2]
    short = int(mask[0].sum())
    ids[0], mask[0] = ids[0].roll(len(ids[0]) - short), mask[0].roll(len(ids[0]) - short)
    model.generate(ids, images=pixels, attention_mask=mask, max_new_tokens=1)
    assert heard((model, tokenizer, None)) == HEARD[:2]


def test_where_nothing_follows_the_image_all_the_text_is_the_question(listening, photo):
    llava = listening("v15")
    generate(*llava, [photo((90, 50))], ASK[3], max_new_tokens=1)
    assert heard(llava) == ["<s>What is to be seen here?"]


def test_rows_of_text_are_no_one_elses_question(listening, photo):
    llava = listening("v15")
    one, other = photo((90, 50)), photo((9, 9))
    generate(*llava, [one], TEXT, ASK[0], max_new_tokens=1)
    assert heard(llava) == HEARD[:1]
    generate(*llava, [other, one], TEXT, ASK[0], max_new_tokens=1)
    assert heard(llava) == ["<s>" + TEXT, HEARD[0]]  # an image that training puts there


@pytest.mark.parametrize("kind", ["v15", "next"])
def test_another_question_for_choosing_is_one_argument_away(loaded, photo, kind):
    model, tokenizer, processor = loaded(kind)
    attach(model, build_pruner("cdpruner", keep=0.1))
    images = [photo((640, 480), 1), photo((300, 500), 2)]

    def patches(image, text, **given):
        generate(model, tokenizer, processor, [image], text, max_new_tokens=1, **given)
        return model.kept[0].kept.patch

    rows = [prompt_ids(tokenizer, text)[0][0] for text in ASK[:2]]
    own = [[patches(image, text) for text in ASK[:2]] for image in images]
    for chosen in own:
        assert not torch.equal(*chosen)
    for image, chosen in zip(images, own, strict=True):
        assert torch.equal(patches(image, ASK[0], questions=[rows[1]]), chosen[1])
        assert torch.equal(patches(image, ASK[0]), chosen[0])  # for one call only
    both = generate(model, tokenizer, processor, images, *ASK[:2], questions=rows[::-1])
    crossed = [model.kept[i].kept.patch for i in (0, 1)]
    assert torch.equal(crossed[0], own[0][1])
    assert torch.equal(crossed[1], own[1][0])
    single = [
        generate(model, tokenizer, processor, [image], text, questions=[row])[0]
        for image, text, row in zip(images, ASK[:2], rows[::-1], strict=True)
    ]
    assert both == single
    model.pruner = build_pruner("cdpruner", keep=0.1, question="other")
    assert torch.equal(patches(images[0], ASK[0], questions=[rows[1]]), own[0][1])


def test_a_batch_chooses_like_single_requests(loaded, photo):
    llava = loaded("next")
    attach(llava[0], build_pruner("cdpruner", keep=0.1))
    images = [photo((640, 480), 1), photo((300, 500), 2)]
    together = generate(*llava, images, *ASK[:2])
    kept = [image.kept.patch for image in llava[0].kept]
    for i in (0, 1):
        assert generate(*llava, [images[i]], ASK[i])[0] == together[i]
        assert torch.equal(llava[0].kept[0].kept.patch, kept[i])


def test_the_control_asks_for_the_other_question(loaded, photo):
    llava = loaded("v15")
    attach(llava[0], build_pruner("cdpruner", keep=0.1, question="other"))
    with pytest.raises(ValueError, match="question=other needs questions="):
        generate(*llava, [photo((90, 50))], ASK[0])
    row = torch.tensor([5, IMAGE_TOKEN_INDEX, 6])
    with pytest.raises(ValueError, match="2 questions for 1 rows"):
        generate(*llava, [photo((90, 50))], ASK[0], questions=[row, row])


def test_images_without_a_prompt_need_a_question(loaded, photo):
    model, tokenizer, processor = loaded("v15")
    attach(model, build_pruner("cdpruner", keep=0.1))
    pixels, _ = prepare_images([photo((90, 50))], processor, model.config)
    with pytest.raises(ValueError, match="by the question, and there is none"):
        model.encode_images(pixels)
    (alone,) = model.encode_images(pixels, questions=prompt_ids(tokenizer, ASK[0])[0])
    generate(model, tokenizer, processor, [photo((90, 50))], ASK[0])
    torch.testing.assert_close(alone, model.kept[0].tokens)


@pytest.fixture(scope="module")
def stock(tiny, tmp_path_factory):
    """Transformers' own LLaVA-NeXT, and what asks it about images of one size."""
    convert = pytest.importorskip("llava_hivtp.convert", exc_type=ImportError)  # transformers 5
    folder = convert.to_transformers(
        tiny(anyres=True), tmp_path_factory.mktemp("next"), torch.float32
    )
    model, tokenizer, processor, _ = load(folder, device_map="cpu")

    def inputs(photo, *texts):
        images = [photo((90, 50), i) for i in range(sum(text.count("<image>") for text in texts))]
        return processor(text=list(texts), images=images, padding=True, return_tensors="pt")

    return model, tokenizer, inputs


def test_transformers_own_classes_hear_the_same(stock, photo):
    model, tokenizer, inputs = stock
    attach(model, Listener())
    batch = inputs(photo, *ASK[:2], TEXT, *ASK[2:])
    model.generate(**batch, max_new_tokens=1)
    told = [HEARD[0], HEARD[1], HEARD[2], HEARD[2], "<s>What is to be seen here?"]
    assert heard((model, tokenizer, None)) == told
    rows = [row[mask.bool()] for row, mask in zip(*list(batch.values())[:2], strict=True)]
    model.generate(**batch, max_new_tokens=1, questions=[rows[1]] * 5)
    assert heard((model, tokenizer, None)) == [HEARD[1]] * 5
