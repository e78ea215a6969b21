"""Pruning nothing is stock LLaVA, to the bit."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
import transformers
from ask import embed, generate
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralForCausalLM

from llava_hivtp import attach, build_pruner, detach

ASK = "USER: <image>\nWhat is this? ASSISTANT:"
# (width, height) -> language model tokens of LLaVA-NeXT: base, cropped mosaic, newlines
COUNTS = {
    (640, 480): 2340,
    (480, 640): 2352,
    (336, 336): 1176,
    (1000, 300): 2182,
    (672, 672): 2928,
}


@contextmanager
def stock(model):
    """The same weights under LLaVA's own code, padding in front as generation needs."""
    side = model.config.tokenizer_padding_side
    model.config.tokenizer_padding_side = "left"
    detach(model)
    try:
        yield model
    finally:
        model.config.tokenizer_padding_side = side
        attach(model)


def same(loaded, kind, images, *texts, pruner="none"):
    model, *rest = loaded(kind)
    attach(model, pruner)
    ours, our_mask = embed(model, *rest, images, *texts)
    tokens = generate(model, *rest, images, *texts)
    kept = model.kept
    with stock(model):
        assert not hasattr(model, "pruner")
        theirs, their_mask = embed(model, *rest, images, *texts)
        assert torch.equal(ours, theirs)
        assert torch.equal(our_mask, their_mask)
        assert tokens == generate(model, *rest, images, *texts)
    return ours, kept


@pytest.mark.parametrize("kind", ["next", "mistral"])
@pytest.mark.parametrize("size", COUNTS)
def test_anyres_keep_all_is_stock(loaded, photo, kind, size):
    embeds, (image,) = same(loaded, kind, [photo(size)], ASK)
    text = embeds.shape[1] - COUNTS[size]
    assert text == 1 + len(ASK.replace("<image>", ""))  # <s> and one token per byte
    assert image.patches + image.newlines == COUNTS[size]
    assert image.patches == image.total


@pytest.mark.parametrize("size", [(336, 336), (640, 200), (30, 500)])
def test_v15_keep_all_is_stock(loaded, photo, size):
    _, (image,) = same(loaded, "v15", [photo(size)], ASK)
    assert (image.patches, image.newlines, image.total) == (576, 0, 576)


@pytest.mark.parametrize("kind", ["v15", "next"])
def test_hivtp_that_keeps_everything_is_stock(loaded, photo, kind):
    same(loaded, kind, [photo((500, 375))], ASK, pruner=build_pruner("hivtp", k=100))


@pytest.mark.parametrize("kind", ["v15", "next"])
def test_two_images_in_one_prompt_are_stock(loaded, photo, kind):
    images = [photo((500, 300)), photo((300, 400), seed=1)]
    same(loaded, kind, images, "USER: <image> and <image>: alike? ASSISTANT:")


@pytest.mark.parametrize("kind", ["v15", "next"])
def test_a_ragged_batch_is_stock(loaded, photo, kind):
    images = [photo((640, 480)), photo((1000, 300), seed=1)]
    same(loaded, kind, images, ASK, "USER: <image>\nHi ASSISTANT:")


@pytest.mark.parametrize("size", [(2000, 10), (1, 1000), (1, 1)])
def test_degenerate_anyres_images_are_stock(loaded, photo, size):
    same(loaded, "next", [photo(size)], ASK)


def test_flat_checkpoints_put_tiles_behind_one_another(loaded, photo):
    model = loaded("next")[0]
    before = model.config.mm_patch_merge_type
    model.config.mm_patch_merge_type = "flat"
    try:
        _, (image,) = same(loaded, "next", [photo((640, 480))], ASK)
        assert image.total == 5 * 576
    finally:
        model.config.mm_patch_merge_type = before


def test_spatial_checkpoints_without_unpadding_are_stock(loaded, photo):
    model = loaded("next")[0]
    before = model.config.mm_patch_merge_type
    model.config.mm_patch_merge_type = "spatial"
    try:
        same(loaded, "next", [photo((640, 480))], ASK)
    finally:
        model.config.mm_patch_merge_type = before


@pytest.mark.parametrize("kind", ["v15", "next", "mistral"])
def test_loaded_by_llava_itself_it_answers_alike(loaded, checkpoints, photo, kind):
    """The official classes and their own loader, none of our code on that side."""
    if kind != "v15" and int(transformers.__version__.split(".")[0]) >= 5:
        pytest.skip("stock LLaVA cannot load LLaVA-NeXT checkpoints under transformers 5")
    model, tokenizer, processor = loaded(kind)
    official = LlavaMistralForCausalLM if kind == "mistral" else LlavaLlamaForCausalLM
    config = official.config_class.from_pretrained(checkpoints(kind))
    config.mm_vision_tower = str(checkpoints(kind) / "tower")
    stock = official.from_pretrained(checkpoints(kind), config=config).eval()
    if not stock.get_vision_tower().is_loaded:
        stock.get_vision_tower().load_model()
    attach(model)
    images = [photo((640, 480))]
    ours, theirs = (embed(m, tokenizer, processor, images, ASK)[0] for m in (model, stock))
    assert torch.equal(ours, theirs)
    ours, theirs = (generate(m, tokenizer, processor, images, ASK) for m in (model, stock))
    assert ours == theirs
