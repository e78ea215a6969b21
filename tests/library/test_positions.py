"""Kept positions: what survives, and the text behind it, stay where they were."""

from __future__ import annotations

import pytest
import torch
from ask import embed, generate, prompt_ids

from llava_hivtp import PRUNERS, attach, build_pruner, detach, load
from llava_hivtp.convert import to_transformers
from llava_hivtp.families.base import check_positions
from llava_hivtp.images import prepare_images

LONG, SHORT = "USER: <image>\nWhich colour has it? ASSISTANT:", "Q <image> A:"
TWO, TEXT = "x <image> or <image> y", "USER: Hello ASSISTANT:"
SIZES = {"v15": [(336, 336), (90, 50)], "next": [(640, 480), (300, 500)]}
METHODS = {name: {"keep": 0.25} for name in PRUNERS} | {"none": {}, "hivtp": {"k": 14, "c": 3}}


@pytest.fixture
def kept(loaded):
    def get(kind, name="none", layout="unpad", **arguments):
        model, *rest = loaded(kind)
        return attach(model, build_pruner(name, **arguments), layout, "kept"), *rest

    yield get
    for kind in ("v15", "next"):
        loaded(kind)[0].positions = "packed"


def positions_of(model, ids, mask, pixels, sizes):
    return model.prepare_inputs_labels_for_multimodal(ids, None, mask, None, None, pixels, sizes)


@pytest.mark.parametrize("kind", SIZES)
def test_nothing_dropped_is_stock_to_the_bit(kept, photo, kind):
    images = [photo(size, i) for i, size in enumerate(SIZES[kind])]
    settings = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 4}
    model, tokenizer, processor = kept(kind)

    def run():
        ids, mask = prompt_ids(tokenizer, LONG, SHORT)
        pixels, sizes = prepare_images(images, processor, model.config)
        if type(model).__name__.startswith("Pruned"):
            return model.generate(
                ids, images=pixels, image_sizes=sizes, attention_mask=mask, pad_token_id=0,
                do_sample=False, **settings,
            )  # fmt: skip
        model.config.tokenizer_padding_side = "left"
        try:
            return model.generate(
                ids, images=pixels, image_sizes=sizes, attention_mask=mask, pad_token_id=0,
                do_sample=False, **settings,
            )  # fmt: skip
        finally:
            model.config.tokenizer_padding_side = "right"

    ours = run()
    detach(model)
    stock = run()
    assert torch.equal(ours.sequences, stock.sequences)
    assert all(map(torch.equal, ours.logits, stock.logits))


@pytest.mark.parametrize("layout", ["unpad", "mosaic"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", SIZES)
def test_a_survivor_has_the_place_of_the_unpruned_prompt(kept, photo, kind, name, layout):
    """Recognised by its embedding; the text by where it stands from the end."""
    images = [photo(size, i) for i, size in enumerate(SIZES[kind])]
    llava = kept(kind, "none", layout)
    model, tokenizer, processor = llava
    ids, mask = prompt_ids(tokenizer, LONG, SHORT)
    prepared = prepare_images(images, processor, model.config)
    whole = positions_of(model, ids, mask, *prepared)
    model.pruner = build_pruner(name, **METHODS[name])
    _, positions, mask, _, embeds, _ = positions_of(model, ids, mask, *prepared)
    for row, image in enumerate(model.kept):
        real = mask[row].bool()
        own, table = positions[row][real], whole[4][row][whole[2][row].bool()]
        assert int(own[-1]) == len(table) - 1
        placed = image.kept.patch[: len(own)] >= 0
        if name in ("avgpool", "prumerge", "prumerge_plus", "visionzip"):
            assert (own < len(table)).all()
            assert len(own) < len(table)
            continue
        assert placed.all()
        assert (own.diff() > 0).all()
        assert torch.allclose(embeds[row][real], table[own], atol=1e-4)


def test_merged_tokens_take_the_place_of_their_centre(kept, photo):
    for name, first in (("visionzip", 0), ("prumerge", None)):
        llava = kept("v15", name, keep=0.1)
        generate(*llava, [photo((336, 336))], LONG, max_new_tokens=1)
        (image,) = llava[0].kept
        centre = image.kept.centre
        has = centre >= 0
        assert torch.equal(image.place[has], centre[has])
        assert int((~has).sum()) == 1
        lost = int((~has).nonzero())
        assert int(image.place[lost]) == (first if lost == 0 else int(image.place[lost - 1]))


@pytest.mark.parametrize("kind", SIZES)
def test_batches_beams_and_rows_of_text_answer_like_single_ones(kept, photo, kind):
    llava = kept(kind, "hivtp", k=14, c=3)
    images = [photo(size, i) for i, size in enumerate(SIZES[kind])]
    for beams in (1, 2):
        together = generate(*llava, [*images, *images], LONG, TEXT, TWO, SHORT, num_beams=beams)
        assert together[0] == generate(*llava, images[:1], LONG, num_beams=beams)[0]
        assert together[2] == generate(*llava, [images[1], images[0]], TWO, num_beams=beams)[0]
        assert together[3] == generate(*llava, images[1:], SHORT, num_beams=beams)[0]


def test_positions_change_what_is_answered_and_where_decoding_goes_on(kept, photo):
    llava = kept("v15", "uniform", keep=0.1)
    seen = []
    hook = (
        llava[0]
        .model.layers[0]
        .register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["position_ids"][0].tolist()),
            with_kwargs=True,
        )
    )
    generate(*llava, [photo((336, 336))], LONG, max_new_tokens=3, eos_token_id=None)
    hook.remove()
    ids, _ = prompt_ids(llava[1], LONG)
    last = ids.shape[1] - 1 + 576 - 1
    assert seen[0][-1] == last
    assert seen[1:] == [[last + 1], [last + 2]]
    llava[0].positions = "packed"
    embeds, _ = embed(*llava, [photo((336, 336))], LONG)
    assert embeds.shape[1] == ids.shape[1] - 1 + 57


@pytest.mark.parametrize("name", ["hivtp", "divprune", "visionzip"])
def test_transformers_own_class_has_the_same_positions(tiny, tmp_path, photo, name):
    official = tiny(anyres=True)
    folder = to_transformers(official, tmp_path, torch.float32)
    layers = {"hivtp": {"layers": (2, 3)}, "visionzip": {"layers": (3,), "keep": 0.5}}
    pruner = build_pruner(name, **layers.get(name, {"keep": 0.5}))
    ours, tokenizer, processor, _ = load(official, pruner, device_map="cpu", positions="kept")
    theirs, _, reader, _ = load(folder, pruner, device_map="cpu", positions="kept")
    images = [photo((112, 90), 0), photo((61, 120), 1)]
    expected = generate(ours, tokenizer, processor, images, LONG, SHORT)
    batch = reader(text=[LONG, SHORT], images=images, padding=True, return_tensors="pt")
    length = batch["input_ids"].shape[1]
    found = theirs.generate(**batch, max_new_tokens=5, do_sample=False, pad_token_id=0)
    special = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert [[t for t in row if t not in special] for row in found[:, length:].tolist()] == expected


def test_what_cannot_keep_positions_says_so(loaded, monkeypatch):
    with pytest.raises(ValueError, match="positions must be one of .*'some'"):
        attach(loaded("v15")[0], positions="some")
    model = loaded("v15")[0]
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(ValueError, match="takes a row with gaps for several rows"):
        check_positions("kept", model)
    monkeypatch.setattr("transformers.__version__", "4.37.2")
    with pytest.raises(ValueError, match="positions='kept' needs transformers 5"):
        check_positions("kept")
