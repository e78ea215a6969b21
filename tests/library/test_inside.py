"""Methods inside the language model of whole LLaVAs, official and transformers' own."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from ask import generate, prompt_ids
from transformers import GenerationConfig

from llava_hivtp import attach, build_pruner, detach, load
from llava_hivtp.convert import to_transformers
from llava_hivtp.dropping import check_decoder, dropping
from llava_hivtp.images import prepare_images
from llava_hivtp.pruners import LAYER_PRUNERS, for_depth

LONG, SHORT = "USER: <image>\nWhat is there in this picture? ASSISTANT:", "Q <image> A:"
TWO, TEXT = "x <image> or <image> y", "no image here"
SIZES = [(112, 90), (56, 56), (160, 50), (61, 120)]
GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
LOGITS = {"output_logits": True, "return_dict_in_generate": True}
KINDS = ["v15", "next", "mistral"]
WAYS = [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}]
every_method = pytest.mark.parametrize("name", LAYER_PRUNERS)
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def official(tiny):
    """(model, tokenizer, image processor) by kind; its language model has two layers."""
    made = {}

    def get(kind):
        if kind not in made:
            folder = tiny(anyres=kind != "v15", mistral=kind == "mistral")
            made[kind] = load(folder, device_map="cpu")[:3]
        return made[kind]

    return get


@pytest.fixture(scope="module")
def converted(tiny, tmp_path_factory):
    """The same weights in transformers' own classes: (model, processor)."""
    made = {}

    def get(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            to_transformers(tiny(anyres=kind == "next"), folder, torch.float32)
            made[kind] = load(folder, device_map="cpu")[:3:2]
        return made[kind]

    return get


@pytest.fixture
def inputs(official, photo):
    """Arguments of official `generate` for texts and their images."""

    def get(kind, *texts):
        model, tokenizer, processor = official(kind)
        ids, mask = prompt_ids(tokenizer, *texts)
        count = sum(text.count("<image>") for text in texts)
        images = [photo(size, i) for i, size in enumerate(SIZES[:count])]
        pixels, sizes = prepare_images(images, processor, model.config)
        return {"inputs": ids, "attention_mask": mask, "images": pixels, "image_sizes": sizes}

    return get


def method(name, keep=0.5, **arguments):
    return build_pruner(name, after=1, keep=keep, **arguments)


def run(model, given, **settings):
    return model.generate(**copy.deepcopy(dict(given)), **(GREEDY | settings))


@every_kind
@every_method
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_keep_all_is_stock_to_the_bit(official, inputs, kind, name, way):
    model, given = official(kind)[0], inputs(kind, LONG, SHORT)
    attach(model, method(name, keep=1.0))
    ours = run(model, given, **LOGITS, **way)
    detach(model)
    model.config.tokenizer_padding_side = "left"
    try:
        stock = run(model, given, **LOGITS, **way)
    finally:
        model.config.tokenizer_padding_side = "right"
    assert torch.equal(ours.sequences, stock.sequences)
    assert all(map(torch.equal, ours.logits, stock.logits))


@pytest.mark.parametrize("kind", KINDS[:2])
@every_method
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_keep_all_is_transformers_own_class_to_the_bit(converted, photo, kind, name, way):
    model, processor = converted(kind)
    images = [photo(size, i) for i, size in enumerate(SIZES[:2])]
    given = processor(text=[LONG, TEXT, SHORT], images=images, padding=True, return_tensors="pt")
    attach(model, method(name, keep=1.0))
    ours = run(model, given, **LOGITS, **way)
    stock = run(detach(model), given, **LOGITS, **way)
    assert torch.equal(ours.sequences, stock.sequences)
    assert all(map(torch.equal, ours.logits, stock.logits))


def spliced(model, given):
    """Embeddings, mask and where the images are, padded in front, put together by hand."""
    attach(model, "none")
    flat, table = model.encode_images(given["images"], given["image_sizes"]), model.get_model()
    rows, slots = [], iter(flat)
    for ids, real in zip(given["inputs"], given["attention_mask"], strict=True):
        parts = []
        for token in ids[real].tolist():
            if token < 0:
                parts.append((image := next(slots), torch.ones(len(image))))
            else:
                parts.append((table.embed_tokens(torch.tensor([token])), torch.zeros(1)))
        rows.append([torch.cat(column) for column in zip(*parts, strict=True)])
    longest = max(len(where) for _, where in rows)
    embeds = torch.zeros(len(rows), longest, model.config.hidden_size)
    image, mask = (torch.zeros(len(rows), longest, dtype=torch.long) for _ in range(2))
    for i, (row, where) in enumerate(rows):
        embeds[i, -len(row) :], image[i, -len(row) :], mask[i, -len(row) :] = row, where, 1
    return embeds, mask, image.bool()


@every_kind
@every_method
@torch.no_grad()
def test_what_drops_are_the_images_tokens_of_the_splice(official, inputs, kind, name):
    """Against `dropping` on embeddings put together by hand: it equals rows deleted by hand."""
    model, given = official(kind)[0], inputs(kind, LONG, TWO, TEXT, SHORT)
    embeds, mask, image = spliced(model, given)
    attach(model, method(name))
    ours = run(model, given, **LOGITS)
    kept = [len(one.tokens) for one in model.kept]
    assert image.sum(1).tolist() == [kept[0], kept[1] + kept[2], 0, kept[3]]
    detach(model)
    with dropping(model.get_model(), method(name), lambda rows: (image, mask.bool())):
        theirs = model.__class__.__mro__[1].generate(
            model, inputs_embeds=embeds, attention_mask=mask, **GREEDY, **LOGITS
        )
    assert torch.equal(ours.sequences, theirs.sequences)
    assert all(map(torch.equal, ours.logits, theirs.logits))


@every_kind
@every_method
def test_a_ragged_batch_answers_like_single_prompts(official, inputs, photo, kind, name):
    llava, texts = official(kind), (LONG, TWO, TEXT, SHORT)
    model = attach(llava[0], method(name))
    images = [photo(size, i) for i, size in enumerate(SIZES)]
    own = [images[:1], images[1:3], [], images[3:]]
    for way in WAYS[:2]:
        together = generate(*llava, images, *texts, **way)
        share = model.mean_per_layer
        alone = [
            generate(*llava, each, text, **way)[0] for text, each in zip(texts, own, strict=True)
        ]
        assert together == alone
        assert share[2] == 0
        generate(*llava, images[:1], LONG, **way)
        assert model.mean_per_layer == share[:1]


@pytest.mark.parametrize("kind", KINDS[:2])
@every_method
@pytest.mark.parametrize("first", [0, 2])
def test_the_same_weights_in_official_llava_answer_the_same(
    official, converted, photo, kind, name, first
):
    ours, (theirs, processor) = official(kind), converted(kind)
    attach(ours[0], method(name))
    attach(theirs, method(name))
    images = [photo(size, i) for i, size in enumerate(SIZES[first : first + 2], first)]
    answers = generate(*ours, images, LONG, TEXT, SHORT)
    batch = processor(text=[LONG, TEXT, SHORT], images=images, padding=True, return_tensors="pt")
    rows = theirs.generate(**batch, max_new_tokens=5, do_sample=False)
    special = {0, 1, 2}
    new = rows[:, batch["input_ids"].shape[1] :].tolist()
    assert [[t for t in row if t not in special] for row in new] == answers
    assert theirs.mean_per_layer == ours[0].mean_per_layer


def test_a_layer_reads_what_the_method_says(official, inputs):
    model, given = official("v15")[0], inputs("v15", LONG, SHORT)
    attach(model, method("fastv", keep=0.25))
    run(model, given)
    assert model.mean_per_layer == [(16 + 4) / 2] * 2
    assert model.pruner.per_layer(16, 2) == [16, 4]
    run(model, {"inputs": prompt_ids(official("v15")[1], TEXT)[0]})
    assert model.mean_per_layer is None
    attach(model, "none")
    run(model, given)
    assert model.mean_per_layer is None


def test_what_a_layer_read_is_what_it_caches(official, inputs):
    model, given = official("v15")[0], inputs("v15", LONG)
    attach(model, method("pdrop", keep=0.25))
    cache = run(model, given, return_dict_in_generate=True).past_key_values
    new, text = GREEDY["max_new_tokens"] - 1, given["inputs"].shape[1] - 1
    cached = [layer.keys.shape[2] - new - text for layer in cache.layers]
    assert cached == [16, 4]
    assert model.mean_per_layer == [sum(cached) / 2]


def test_row_breaks_are_no_patches(official, inputs):
    model, given = official("next")[0], inputs("next", LONG)
    attach(model, method("fastv", keep=1.0))
    run(model, given)
    assert model.kept[0].newlines > 0
    assert model.mean_per_layer == [model.kept[0].patches]


@every_kind
@every_method
def test_a_method_before_the_language_model_and_one_inside_it(official, inputs, kind, name):
    model, given = official(kind)[0], inputs(kind, LONG, SHORT)
    both = method(name, encoder="visionzip:keep=0.5:layers=3")
    assert both == method(name, encoder=build_pruner("visionzip", keep=0.5, layers=(3,)))
    attach(model, both)
    ours = run(model, given, **LOGITS).logits
    entered, layers = [one.kept.patch for one in model.kept], model.mean_per_layer
    assert max(layers) < max(one.patches for one in model.kept)
    attach(model, both.encoder)
    assert not torch.equal(run(model, given, **LOGITS).logits[0], ours[0])
    assert all(map(torch.equal, entered, [one.kept.patch for one in model.kept]))


@pytest.mark.parametrize("name", ["fastv", "pdrop"])
def test_the_score_is_the_layers_own_attention_weighed_keys_and_all(
    official, inputs, monkeypatch, name
):
    model, given = official("v15")[0], inputs("v15", LONG, SHORT)
    seen, maps, score = [], [], LAYER_PRUNERS[name].score

    def watched(self, state):
        seen.append(score(self, state))
        return seen[-1]

    monkeypatch.setattr(LAYER_PRUNERS[name], "score", watched)
    encoder = "visionzip:keep=0.5:layers=3:weigh=true"
    attach(model, method(name, encoder=encoder))
    run(model, given, max_new_tokens=1)
    attach(model, method(name, encoder=encoder).encoder)
    layer = model.get_model().layers[1 if name == "pdrop" else 0].self_attn
    hook = layer.register_forward_hook(lambda *call: maps.append(call[2][1]))
    model.set_attn_implementation("eager")
    try:
        run(model, given, max_new_tokens=1)
    finally:
        hook.remove()
        model.set_attn_implementation("sdpa")
    torch.testing.assert_close(seen[0], maps[0][:, :, -1].mean(1))


def test_the_method_of_the_readme_runs_as_printed(official, inputs):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    source = next(part for part in readme.split("```python\n") if "class Longest" in part)
    names = {"__name__": __name__}
    exec(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from torch import Tensor\n"
        "from llava_hivtp.pruners.layered import LayerPruner, LayerState\n"
        + source.partition("```")[0],
        names,
    )
    model = attach(official("v15")[0], names["Longest"](after=(1,), keep=0.25))
    run(model, inputs("v15", LONG))
    assert model.mean_per_layer == [(16 + 4) / 2]


def test_the_paper_layers_of_an_encoder_method_move_along():
    moved = for_depth(method("fastv", encoder="fopru:keep=0.5"), 12)
    assert moved.layers == moved.encoder.layers == (11,)
    assert moved.after == (1,)


@every_method
def test_kept_positions_of_the_encoder_method_go_on(official, inputs, name):
    model, given = official("v15")[0], inputs("v15", LONG, SHORT)
    attach(model, method(name, encoder="uniform:keep=0.5"), positions="kept")
    both = run(model, given, **LOGITS)
    for i, text in enumerate((LONG, SHORT)):
        alone = {**inputs("v15", text), "images": given["images"][i : i + 1]}
        single = run(model, alone, **LOGITS)
        assert torch.equal(single.sequences[0], both.sequences[i])
    attach(model, method(name, encoder="uniform:keep=0.5"), positions="packed")
    assert not torch.equal(run(model, given, **LOGITS).logits[0], both.logits[0])


@pytest.mark.parametrize("kind", KINDS[:2])
def test_a_direct_call_gives_the_logits_of_what_is_left(official, converted, inputs, photo, kind):
    model, given = official(kind)[0], inputs(kind, LONG)
    attach(model, method("fastv"))
    first = run(model, given, **LOGITS).logits[0]
    ids = given.pop("inputs")
    found = model(input_ids=ids, **given)
    torch.testing.assert_close(found.logits[:, -1], first)
    (image,) = model.kept
    length = ids.shape[1] - 1 + len(image.tokens)
    assert found.logits.shape[1] == length - (len(image.tokens) - len(image.tokens) // 2)
    with pytest.raises(ValueError, match="labels have no logits"):
        model(input_ids=ids, labels=ids, **given)
    with pytest.raises(ValueError, match="needs an empty DynamicCache"):
        model(input_ids=ids[:, :1], past_key_values=found.past_key_values)
    other, processor = converted(kind)
    attach(other, method("fastv"))
    batch = processor(text=[LONG], images=[photo(SIZES[0], 0)], return_tensors="pt")
    found = other(**batch).logits[:, -1, : first.shape[1]]  # one word more, the image's mark
    torch.testing.assert_close(found, first)
    with pytest.raises(ValueError, match="labels have no logits"):
        other(**batch, labels=batch["input_ids"])
    processor.tokenizer.padding_side = "right"
    images = [photo(size, i) for i, size in enumerate(SIZES[:2])]
    batch = processor(text=[LONG, SHORT], images=images, padding=True, return_tensors="pt")
    processor.tokenizer.padding_side = "left"
    with pytest.raises(ValueError, match="pad in front"):
        other(**batch)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_lookup_num_tokens": 3}, "leave out prompt_lookup_num_tokens=3"),
        ({"assistant_model": torch.nn.Linear(1, 1)}, "leave out assistant_model=Linear"),
        ({"prefill_chunk_size": 8}, "leave out prefill_chunk_size=8"),
        ({"use_cache": False}, "leave out use_cache=False"),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"generation_config": GenerationConfig(prefill_chunk_size=8)}, "prefill_chunk_size=8"),
    ],
)
def test_a_prompt_in_pieces_is_refused_before_the_tower_runs(
    official, converted, inputs, photo, settings, message, monkeypatch
):
    model, given = official("v15")[0], inputs("v15", LONG)
    attach(model, method("fastv"))
    monkeypatch.setattr(type(model), "prune", None)
    with pytest.raises(ValueError, match=message):
        run(model, given, **settings)
    other, processor = converted("v15")
    attach(other, method("fastv"))
    batch = processor(text=[LONG], images=[photo(SIZES[0], 0)], return_tensors="pt")
    monkeypatch.setattr(type(other), "prune", None)
    with pytest.raises(ValueError, match=message):
        run(other, batch, **settings)


def test_what_cannot_work_inside_is_refused_when_attached(official, monkeypatch):
    model = attach(official("mistral")[0])
    with pytest.raises(ValueError, match=r"FastV: layers \[2\] lie outside 1..1: behind"):
        model.pruner = build_pruner("fastv")
    with pytest.raises(ValueError, match="keep=0.05 of 16 patches keeps no token"):
        model.pruner = method("fastv", keep=0.05)
    with pytest.raises(ValueError, match=r"layers \[9\] lie outside 1..4"):
        model.pruner = method("fastv", encoder="fopru:layers=9")
    with monkeypatch.context() as patched:
        patched.setattr(model.config, "sliding_window", 64)
        with pytest.raises(ValueError, match="a sliding window .sliding_window=64. would see"):
            attach(model, method("pdrop"))
    with monkeypatch.context() as patched:
        patched.setattr("transformers.__version__", "4.37.2")
        with pytest.raises(ValueError, match="FastV works inside .* needs transformers 5"):
            attach(model, method("fastv"))
    with pytest.raises(ValueError, match="of Linear that is not known"):
        check_decoder(torch.nn.Linear(1, 1), method("dart"))
    assert type(model.pruner).__name__ == "Pruner"


def test_hooks_are_gone_after_a_call_and_after_an_error(official, inputs):
    model, given = official("v15")[0], inputs("v15", LONG)
    attach(model, method("sparsevlm"))
    run(model, given)
    given["images"] = torch.full_like(given["images"], torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        run(model, given)
    assert not any(block._forward_pre_hooks for block in model.get_model().layers)
    attach(model, "none")
    assert run(model, inputs("v15", LONG)).shape == (1, 5)
