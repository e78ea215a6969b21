"""transformers' own LLaVA and LLaVA-NeXT: keep-all is stock, pruned they are official LLaVA."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from ask import METHODS, generate
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

from llava_hivtp import attach, detach
from llava_hivtp.families import hf
from llava_hivtp.images import prepare_images

LONG, SHORT = "USER: <image>\nWhat is there in this picture? ASSISTANT:", "Q <image> A:"
SIZES = [(112, 90), (56, 56), (160, 50), (61, 120)]
STOCK = {"v15": LlavaForConditionalGeneration, "next": LlavaNextForConditionalGeneration}
BEFORE_5 = int(transformers.__version__.split(".")[0]) < 5
NOT_ON_4 = {  # why `stock` differs before 5
    "use_cache": "with embeddings it caches all the same: equal tokens, logits rounded otherwise",
    "num_beams": "its beams mix up the images of rows that have two",
}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


@pytest.fixture
def ask(pair, photo):
    """(model, inputs): texts and the indices of their images."""

    def get(kind, *asked):
        model, _, processor, _ = pair(kind)[1]
        images = [photo(SIZES[i], i) for _, own in asked for i in own]
        texts = [text for text, _ in asked]
        return attach(model), processor(
            text=texts, images=images or None, padding=True, return_tensors="pt"
        )

    return get


def run(model, batch, **more):
    options = GREEDY | {"output_logits": True, "return_dict_in_generate": True} | more
    return model.generate(**copy.deepcopy(dict(batch)), **options)


PROMPTS = {
    "single": [(LONG, [0])],
    "ragged": [(LONG, [0]), (SHORT, [1])],
    "two images": [("x <image><image> y", [2, 3]), (SHORT, [0])],
    "text only row": [(LONG, [0]), ("no image here", []), (SHORT, [3])],
}
WAYS = [
    {},
    {"num_beams": 3},
    {"num_beams": 2, "num_return_sequences": 2},
    {"cache_implementation": "static", "disable_compile": True},
    {"use_cache": False},
]


@pytest.mark.parametrize("kind", STOCK)
@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_keep_all_is_stock_to_the_bit(ask, kind, prompts, way):
    if BEFORE_5 and ("use_cache" in way or ("num_beams" in way and prompts == "two images")):
        pytest.skip(NOT_ON_4[next(iter(way))])
    model, batch = ask(kind, *PROMPTS[prompts])
    ours = run(model, batch, **way)
    assert type(detach(model)) is STOCK[kind]
    stock = run(model, batch, **way)
    assert torch.equal(ours.sequences, stock.sequences)
    assert len(ours.logits) == len(stock.logits) == 6
    assert all(map(torch.equal, ours.logits, stock.logits))


@pytest.mark.parametrize("kind", STOCK)
def test_among_the_embeddings_the_same_tokens_give_the_same_answer(ask, kind, monkeypatch):
    """As they are handed over before 5.18."""
    model, batch = ask(kind, *PROMPTS["ragged"])
    model.pruner = METHODS["hivtp"]
    whole, call = run(model, batch).sequences, model(**batch).logits
    monkeypatch.setattr(hf, "takes_encoder_outputs", lambda model: False)
    assert torch.equal(run(model, batch).sequences, whole)
    assert torch.equal(model(**batch).logits, call)


@pytest.mark.parametrize("kind", STOCK)
def test_a_direct_call_and_its_loss_are_stock(ask, kind):
    model, batch = ask(kind, *PROMPTS["ragged"])
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    ours = model(**batch, labels=labels)
    first = model(batch["input_ids"], **{k: v for k, v in batch.items() if k != "input_ids"})
    stock = detach(model)(**batch, labels=labels)
    assert torch.equal(ours.logits, stock.logits)
    assert torch.equal(first.logits, stock.logits)
    assert torch.equal(ours.loss, stock.loss)


@pytest.mark.parametrize("kind", STOCK)
def test_training_reaches_the_projector(ask, kind):
    model, batch = ask(kind, *PROMPTS["ragged"])
    model.pruner = METHODS["hivtp"]
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    model(**batch, labels=labels).loss.backward()
    gradients = [p.grad for p in model.model.multi_modal_projector.parameters()]
    model.zero_grad(set_to_none=True)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    copy.deepcopy(model)


@pytest.mark.skipif(BEFORE_5, reason="4.57 no longer goes with official LLaVA's class")
@pytest.mark.parametrize("kind", STOCK)
def test_half_of_the_projector_and_its_last_layer_are_the_projector(pair, kind):
    (official, *_), (ours, *_) = pair(kind)
    tokens = torch.randn(2, 5, official.config.mm_hidden_size)
    halfway = official.half_project(tokens)
    assert torch.equal(official.get_model().mm_projector[-1](halfway), official.project(tokens))
    assert torch.equal(ours.half_project(tokens), halfway)
    assert torch.equal(ours.project(tokens), official.project(tokens))


@pytest.mark.skipif(BEFORE_5, reason="4.57 no longer goes with official LLaVA's class")
def test_a_projector_of_one_layer_has_no_half(pair, monkeypatch):
    (official, *_), _ = pair("v15")
    tokens = torch.randn(2, 5, official.config.mm_hidden_size)
    monkeypatch.setitem(official.get_model()._modules, "mm_projector", nn.Linear(5, 5))
    assert official.half_project(tokens) is tokens


@pytest.mark.skipif(BEFORE_5, reason="4.57 no longer generates with official LLaVA's class")
@pytest.mark.parametrize("kind", STOCK)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("size", range(len(SIZES)))
def test_the_same_weights_in_official_llava_keep_and_answer_the_same(pair, photo, kind, name, size):
    (official, *rest, _), (ours, _, processor, _) = pair(kind)
    image = photo(SIZES[size], size)
    attach(official, METHODS[name])
    attach(ours, METHODS[name])
    answer = generate(official, *rest, [image], LONG, max_new_tokens=4)
    batch = processor(text=[LONG], images=[image], return_tensors="pt")
    pixels, _ = prepare_images([image], rest[1], official.config)
    assert torch.equal(batch["pixel_values"], pixels)
    rows = ours.generate(**batch, max_new_tokens=4, do_sample=False, eos_token_id=2)
    special = {0, 1, 2}
    new = [t for t in rows[0, batch["input_ids"].shape[1] :].tolist() if t not in special]
    (theirs,), (mine,) = official.kept, ours.kept
    assert torch.equal(theirs.kept.tile, mine.kept.tile)
    assert torch.equal(theirs.kept.patch, mine.kept.patch)
    assert torch.equal(theirs.tokens, mine.tokens)
    assert (theirs.patches, theirs.newlines, theirs.total) == (
        mine.patches,
        mine.newlines,
        mine.total,
    )
    assert [new] == answer


@pytest.mark.parametrize("kind", STOCK)
@pytest.mark.parametrize("layout", ["unpad", "inside"])
def test_a_ragged_batch_answers_like_single_requests(ask, kind, layout):
    alone = []
    for one in PROMPTS["two images"] + PROMPTS["text only row"]:
        model, batch = ask(kind, one)
        attach(model, METHODS["hivtp"], layout)
        rows = run(model, batch).sequences
        seen = model.kept if one[1] else ()  # which stays what the last call with images saw
        alone.append((rows[0, -6:].tolist(), [image.kept.patch.tolist() for image in seen]))
        assert torch.equal(rows[:, :-6], batch["input_ids"])
    model, batch = ask(kind, *PROMPTS["two images"], *PROMPTS["text only row"])
    attach(model, METHODS["hivtp"], layout)
    together = run(model, batch, num_return_sequences=1).sequences
    kept = [image.kept.patch.tolist() for image in model.kept]
    assert kept == [patches for _, images in alone for patches in images]
    assert together[:, -6:].tolist() == [tokens for tokens, _ in alone]
    assert all(len(image.kept) < image.total for image in model.kept)


def test_what_is_read_is_the_kept_tokens_in_place_of_the_placeholders(ask):
    """Without cache, from embeddings put together by hand."""
    model, batch = ask("next", *PROMPTS["ragged"])
    model.pruner = METHODS["hivtp"]
    answers = run(model, batch).sequences[:, -6:]
    kept, embed = model.kept, model.get_input_embeddings()
    for row, image in enumerate(kept):
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        where = (ids == model.config.image_token_id).nonzero()[:, 0]
        parts = [embed(ids[: where[0]]), image.tokens, embed(ids[where[-1] + 1 :])]
        read, said = torch.cat(parts)[None], []
        for _ in range(6):
            hidden = model.model.language_model(inputs_embeds=read).last_hidden_state
            logits = model.lm_head(hidden[0, -1])
            logits[model.config.image_token_id] = -torch.inf  # never generated
            said.append(int(logits.argmax()))
            read = torch.cat([read, embed(torch.tensor([[said[-1]]]))], 1)
        assert said == answers[row].tolist()


@pytest.mark.parametrize("kind", STOCK)
def test_limits_and_streams_count_the_whole_prompt(ask, kind):
    model, batch = ask(kind, *PROMPTS["single"])
    model.pruner = METHODS["hivtp"]
    want, length = run(model, batch).sequences, batch["input_ids"].shape[1]
    got = run(model, batch, max_new_tokens=None, max_length=length + 6).sequences
    assert torch.equal(got, want)
    want = run(model, batch, eos_token_id=2).sequences
    config = copy.deepcopy(model.generation_config)
    config.max_length, config.do_sample = length + 6, False
    rest = {name: value for name, value in batch.items() if name != "input_ids"}
    assert torch.equal(model.generate(batch["input_ids"], config, **rest), want)

    class Stream:
        seen = 0

        def put(self, tokens):
            Stream.seen += 1

        def end(self):
            pass

    run(model, batch, streamer=Stream())
    assert Stream.seen == 7


def test_prompts_without_images_are_stocks(ask):
    model, batch = ask("v15", ("Hello", []))
    model.pruner = METHODS["hivtp"]
    ours = run(model, batch)
    assert all(map(torch.equal, ours.logits, run(detach(model), batch).logits))


def refusals():
    yield (
        "placeholders in the prompts, the images take 16",
        lambda m, b: (
            b
            | {
                "input_ids": b["input_ids"][:, 1:].where(b["input_ids"][:, 1:] != 3, 3)[:, 10:],
                "attention_mask": None,
            }
        ),
    )
    yield (
        "pixel_values must be a floating-point",
        lambda m, b: b | {"pixel_values": b["pixel_values"].to(torch.uint8)},
    )
    yield (
        "pixel_values need input_ids",
        lambda m, b: {k: v for k, v in b.items() if k != "input_ids"},
    )
    yield (
        "in the first call only",
        lambda m, b: b | {"attention_mask": torch.ones(1, 3 + b["input_ids"].shape[1])},
    )
    yield "vision_feature_layer=-1 in a call", lambda m, b: b | {"vision_feature_layer": -1}
    yield "image 0 gives NaN", lambda m, b: b | {"pixel_values": b["pixel_values"] * torch.nan}


@pytest.mark.parametrize(("message", "spoil"), refusals())
def test_bad_calls_are_refused_by_name(ask, message, spoil):
    model, batch = ask("v15", *PROMPTS["single"])
    with pytest.raises((ValueError, TypeError), match=message):
        model.generate(**spoil(model, dict(batch)), max_new_tokens=1)


def test_images_in_the_order_of_other_prompts_are_refused(ask):
    model, batch = ask("next", (SHORT, [0]), (SHORT, [2]))
    batch["image_sizes"] = batch["image_sizes"].flip(0)
    batch["pixel_values"] = batch["pixel_values"].flip(0)
    with pytest.raises(ValueError, match="in the order of the prompts"):
        model(**batch)
    model, batch = ask("next", (SHORT, [0]))
    with pytest.raises(ValueError, match="image_sizes is missing"):
        model(**{k: v for k, v in batch.items() if k != "image_sizes"})
    batch["pixel_values"] = batch["pixel_values"][:, :2]
    with pytest.raises(ValueError, match="images of .5. tiles"):
        model(**batch)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "vision_feature_select_strategy",
            "full",
            "'full' is not supported on a clip",
        ),
        ("vision_feature_layer", [-2, -5], "only the last"),
        ("vision_feature_layer", -5, "only the last"),
    ],
)
def test_models_that_cannot_be_pruned_are_refused_by_name(ask, name, value, message):
    model, _ = ask("v15", *PROMPTS["single"])
    detach(model)
    before = getattr(model.config, name)
    setattr(model.config, name, value)
    try:
        with pytest.raises(ValueError, match=message):
            attach(model)
    finally:
        setattr(model.config, name, before)
    with pytest.raises(ValueError, match="layout must be one of"):
        attach(model, layout="mosaic")
    assert type(model) is LlavaForConditionalGeneration


def test_eight_threads_on_one_model_see_their_own(ask):
    model, batch = ask("next", *PROMPTS["single"])
    other = ask("next", *PROMPTS["two images"])[1]
    model.pruner = METHODS["hivtp"]

    def see(which):
        rows = run(model, (batch, other)[which % 2]).sequences.tolist()
        return rows, [image.kept.patch.tolist() for image in model.kept]

    alone = see(0), see(1)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(see, range(80)))
    assert found == [alone[which % 2] for which in range(80)]


@pytest.mark.parametrize(("size", "theirs", "ours"), [((376, 799), 52, 50), ((656, 205), 16, 14)])
def test_two_sizes_of_24180_are_unpadded_otherwise(size, theirs, ours):
    """Transformers rounds what official LLaVA cuts off: rows of the mosaic."""
    from llava.model.llava_arch import unpad_image as official
    from transformers.models.llava_next.modeling_llava_next import unpad_image as stock

    mosaic = torch.empty(0, 72, 24) if size[0] < size[1] else torch.empty(0, 24, 48)
    assert stock(mosaic, size[::-1]).shape[1] == theirs
    assert official(mosaic, size).shape[1] == ours
