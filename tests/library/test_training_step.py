"""A step of training: loss and gradients with and without a method."""

from __future__ import annotations

import pytest
import torch
from ask import METHODS, prompt_ids
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX

from eval.untrained.random_llava import random_llava
from llava_hivtp import attach, build_pruner, detach, load
from llava_hivtp.pruners.base import Pruner

ROWS = {
    "one image a row": ["<image>\nWhat? ASSISTANT: a cat", "USER: <image>\nWho? ASSISTANT: I"],
    "rows of text": ["<image>\nWhat? ASSISTANT: a cat", "Who are you? ASSISTANT: I", "Say: b"],
    "no image at all": ["Who are you? ASSISTANT: I", "Say: b"],
    "several images": ["<image> and <image>: alike? No", "Which <image>? This", "Say: b"],
}
LENGTHS = (None, 24)  # the second cuts rows off inside an image and behind it


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(model, tokenizer) of 4 encoder layers and 16 patches; LLaVA's training mode is off."""
    folder = random_llava(tmp_path_factory.mktemp("tiny"), encoder_layers=4, image_size=56)
    return load(folder, device_map="cpu")[:2]


def batch(tokenizer, texts):
    """A batch as LLaVA's collator makes it: a row without an image comes with a black one."""
    ids, mask = prompt_ids(tokenizer, *texts)
    labels = ids.masked_fill(~mask | (ids == IMAGE_TOKEN_INDEX), IGNORE_INDEX)
    labels[:, :4] = IGNORE_INDEX  # the prompt is not learnt
    counts = [text.count("<image>") for text in texts]
    images = torch.randn(sum(max(n, 1) for n in counts), 3, 56, 56)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "images": images}


def step(model, **given):
    """Loss, and the gradient of every weight that has one."""
    model.zero_grad(set_to_none=True)
    loss = model(**given).loss
    loss.backward()
    found = {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.detach(), found


def by_hand(model, pruner, input_ids, attention_mask, labels, images):
    """The same step on stock LLaVA's projected features, from which rows are deleted here."""
    attach(model, pruner)
    with torch.no_grad():
        model.encode_images(images)
    chosen = [image.kept.patch.tolist() for image in model.kept]
    detach(model)
    features = model.encode_images(images)  # stock: all 16 tokens of every image, projected
    longest = getattr(model.config, "tokenizer_model_max_length", None)
    rows, targets, slot = [], [], 0
    for ids, mask, label in zip(input_ids, attention_mask, labels, strict=True):
        embeds, target = [], []
        for token, goal in zip(ids[mask], label[mask], strict=True):
            if token == IMAGE_TOKEN_INDEX:
                embeds += [features[slot][i] for i in chosen[slot]]
                target += [IGNORE_INDEX] * len(chosen[slot])
                slot += 1
            else:
                embeds.append(model.get_model().embed_tokens(token))
                target.append(int(goal))
        slot += IMAGE_TOKEN_INDEX not in ids
        rows.append(torch.stack(embeds)[:longest])
        targets.append(torch.tensor(target)[:longest])
    pad = torch.nn.utils.rnn.pad_sequence
    real = pad([torch.ones(len(row), dtype=torch.bool) for row in rows], batch_first=True)
    return step(
        model,
        inputs_embeds=pad(rows, batch_first=True),
        labels=pad(targets, batch_first=True, padding_value=IGNORE_INDEX),
        attention_mask=real,
    )


@pytest.fixture
def cut(tiny):
    """Sets the length at which LLaVA cuts rows off."""
    config = tiny[0].config
    yield lambda length: setattr(config, "tokenizer_model_max_length", length)
    config.tokenizer_model_max_length = None


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("rows", ROWS)
def test_a_step_without_pruning_is_stock_to_the_bit(tiny, cut, rows, length):
    model, tokenizer = tiny
    given = batch(tokenizer, ROWS[rows])
    cut(length)
    attach(model, "none")
    loss, gradients = step(model, **given)
    detach(model)
    stock, expected = step(model, **given)
    assert torch.equal(loss, stock)
    assert gradients.keys() == expected.keys()
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("rows", ROWS)
def test_a_step_under_hivtp_is_that_of_rows_deleted_by_hand(tiny, cut, rows, length):
    model, tokenizer = tiny
    given = batch(tokenizer, ROWS[rows])
    cut(length)
    pruner = build_pruner("hivtp", r=2, k=25, c=2, layers="2+3")
    attach(model, pruner)
    loss, gradients = step(model, **given)
    assert all(image.patches < image.total for image in model.kept)
    reference, expected = by_hand(model, pruner, **given)
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        # A batch without any image has no gradient for the projector, here and there.
        other = expected.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-5 * float(loss))
    attach(model, "none")
    assert not torch.equal(step(model, **given)[0], loss) or rows == "no image at all"


@pytest.mark.parametrize("name", [n for n in METHODS if n != "none"])
def test_checkpointing_changes_neither_loss_nor_gradients(tiny, name):
    model, tokenizer = tiny
    given = batch(tokenizer, ROWS["several images"])
    attach(model, METHODS[name])
    loss, gradients = step(model, **given)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})  # as the trainer does
    model.train()
    try:
        again, found = step(model, **given)
    finally:
        model.eval()
        model.gradient_checkpointing_disable()
        model.disable_input_require_grads()
    assert torch.equal(loss, again)
    assert all(torch.equal(gradients[key], found[key]) for key in gradients)
    assert any("mm_projector" in key and grad.any() for key, grad in found.items())


class Watching(Pruner):
    """Keeps all, and remembers whether it ran in mixed precision."""

    seen: list[bool]

    def select(self, features):
        self.seen.append(torch.is_autocast_enabled("cpu"))
        return super().select(features)


def test_a_choice_is_made_in_full_precision_under_autocast(tiny):
    model, tokenizer = tiny
    pruner = Watching()
    pruner.seen = []
    attach(model, pruner)
    given = batch(tokenizer, ROWS["several images"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = step(model, **given)
        detach(model)
        stock = step(model, **given)
    assert pruner.seen == [False] * 4
    assert torch.equal(ours[0], stock[0])
    assert all(torch.equal(ours[1][name], stock[1][name]) for name in stock[1])
