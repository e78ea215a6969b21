"""Merged mass: log(size) on the key of a token, against attention written out with that bias."""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields, replace

import pytest
import torch
from ask import generate, prompt_ids
from features import random_features
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from llava_hivtp import attach, build_pruner, detach
from llava_hivtp.images import prepare_images
from llava_hivtp.merging import merge_dropped
from llava_hivtp.pruners import Pruner
from llava_hivtp.vision import KeptTokens

LONG, SHORT = "USER: <image>\nWhich colour has it? ASSISTANT:", "Q <image> A:"
TWO, TEXT = "x <image> or <image> y", "USER: Hello ASSISTANT:"
SIZES = [(112, 90), (61, 120)]
PROMPTS = {"one": [(LONG, [0])], "ragged": [(LONG, [0]), (SHORT, [1]), (TWO, [1, 0]), (TEXT, [])]}
WAYS = [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"use_cache": False}]
WAYS += [{"cache_implementation": "static", "disable_compile": True}]
METHOD = ("uniform", {"keep": 0.2, "merge": True, "weigh": True})


@dataclass
class Ones(Pruner):
    """Keep everything, and say of every token that it stands for one patch."""

    weigh: bool = True


def asked(pair, photo, family, kind, prompts):
    """(model, call): `call(**settings)` generates, giving token ids and logits."""
    texts = [text for text, _ in PROMPTS[prompts]]
    images = [photo(SIZES[i], i) for _, own in PROMPTS[prompts] for i in own]
    (official, tokenizer, processor, _), (own, _, reader, _) = pair(kind)
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    settings |= {"return_dict_in_generate": True, "output_logits": True}

    def call(**more):
        if family == "official":
            ids, mask = prompt_ids(tokenizer, *texts)
            pixels, sizes = prepare_images(images, processor, official.config)
            return official.generate(
                ids, images=pixels, image_sizes=sizes, attention_mask=mask, **settings | more
            )
        batch = reader(text=texts, images=images, padding=True, return_tensors="pt")
        length = batch["input_ids"].shape[1]
        found = own.generate(**copy.deepcopy(dict(batch)), **settings | more)
        found.sequences = found.sequences[:, length:]
        return found

    return official if family == "official" else own, call


def literal(sizes):
    """Attention written out: softmax of scores, mask and log(size), for a prompt of such sizes."""

    def attend(module, query, key, value, mask, scaling, **rest):
        groups = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
        scores = (query @ key.transpose(2, 3)) * scaling
        if mask is not None:
            scores = scores + mask[..., : key.shape[2]]
        bias = torch.zeros(len(query), key.shape[2])
        for row in range(len(query)):
            own = sizes[row * len(sizes) // len(query)]
            bias[row, : len(own)] = own.log()
        return (scores + bias[:, None, None]).softmax(-1).matmul(value).transpose(1, 2), None

    return attend


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("kind", ["v15", "next"])
@pytest.mark.parametrize("family", ["official", "transformers"])
def test_equals_attention_written_out(pair, photo, monkeypatch, family, kind, prompts, way):
    model, call = asked(pair, photo, family, kind, prompts)
    name, arguments = METHOD
    attach(model, build_pruner(name, **arguments))
    ours = call(**way)
    sizes = prompt_sizes(model, call)
    assert (sizes > 1).any()
    attach(model, build_pruner(name, **arguments | {"weigh": False}))
    AttentionInterface.register("literal", literal(sizes))
    AttentionMaskInterface.register("literal", eager_mask)
    config = model.get_decoder().config
    monkeypatch.setattr(config, "_attn_implementation_internal", "literal")
    theirs = call(**way)
    monkeypatch.undo()
    unweighed = call(**way)
    assert not torch.allclose(ours.logits[-1], unweighed.logits[-1], atol=1e-3)
    assert torch.equal(ours.sequences, theirs.sequences)
    for one, other in zip(ours.logits, theirs.logits, strict=True):
        assert torch.allclose(one, other, atol=2e-5, rtol=1e-4)


def prompt_sizes(model, call):
    """Sizes (B, S) as the language model is told them, by its cache."""
    caches = []
    hook = model.get_decoder().register_forward_hook(
        lambda module, args, kwargs, output: caches.append(output.past_key_values),
        with_kwargs=True,
    )
    call(max_new_tokens=1)
    hook.remove()
    return caches[0].sizes


@pytest.mark.parametrize("family", ["official", "transformers"])
def test_sizes_stand_where_the_tokens_stand(pair, photo, family):
    model, call = asked(pair, photo, family, "next", "ragged")
    attach(model, build_pruner(METHOD[0], **METHOD[1]))
    sizes = prompt_sizes(model, call)
    (first, second, *both), ids = model.kept, [LONG, SHORT, TWO, TEXT]
    length = {text: len(prompt_ids(pair("next")[0][1], text)[0][0]) for text in ids}
    before = {
        text: prompt_ids(pair("next")[0][1], text)[0][0].tolist().index(-200) for text in ids[:3]
    }
    for row, (text, image) in enumerate(zip(ids[:2], (first, second), strict=True)):
        start = before[text]
        behind = length[text] - start - 1
        own = torch.cat([torch.ones(start), image.size, torch.ones(behind)])
        assert torch.equal(sizes[row, -len(own) :], own)
        assert (sizes[row, : -len(own)] == 1).all()
    assert sizes[2].sum() - (sizes[2] == 1).sum() == sum(p.size[p.size > 1].sum() for p in both)
    assert (sizes[3] == 1).all()


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("family", ["official", "transformers"])
def test_sizes_of_one_are_stock_to_the_bit(pair, photo, family, way):
    model, call = asked(pair, photo, family, "next", "ragged")
    attach(model, Ones())
    ours = call(**way)
    attach(model, "none")
    stock = call(**way)  # which the tests of identity compare with the class's own
    assert torch.equal(ours.sequences, stock.sequences)
    assert all(map(torch.equal, ours.logits, stock.logits))


@pytest.mark.parametrize("family", ["official", "transformers"])
def test_what_weighs_leaves_nothing_behind(pair, photo, family):
    model, call = asked(pair, photo, family, "v15", "one")
    attach(model, "none")
    before = call()
    attach(model, build_pruner(METHOD[0], **METHOD[1]))
    call()
    copied = copy.deepcopy(model)
    attach(model, "none")
    assert all(map(torch.equal, call().logits, before.logits))
    detach(model)
    assert not model.get_decoder()._forward_pre_hooks
    attach(copied, "none")


def test_a_batch_answers_like_single_ones(pair, photo):
    model, tokenizer, processor, _ = pair("next")[0]
    attach(model, build_pruner(METHOD[0], **METHOD[1]))
    images = [photo(size, i) for i, size in enumerate(SIZES)]
    together = generate(model, tokenizer, processor, [*images, *images], LONG, TEXT, TWO, SHORT)
    assert together[0] == generate(model, tokenizer, processor, images[:1], LONG)[0]
    assert together[2] == generate(model, tokenizer, processor, images[::-1], TWO)[0]


def literally_merged(kept, features, shown):
    """Patch by patch."""
    tokens = features.tokens
    members = {i: [int(kept.patch[i])] for i in range(len(kept))}
    for tile in range(features.n_tiles):
        own = [i for i in range(len(kept)) if kept.tile[i] == tile and kept.patch[i] >= 0]
        stay = {int(kept.patch[i]) for i in own}
        for patch in range(features.n_patches):
            if not own or patch in stay or (shown is not None and not shown[tile, patch]):
                continue
            cosines = [
                torch.cosine_similarity(tokens[tile, patch], tokens[tile, int(kept.patch[i])], 0)
                for i in own
            ]
            members[own[int(torch.stack(cosines).argmax())]].append(patch)
    means = [tokens[int(kept.tile[i]), members[i]].mean(0) for i in members]
    return torch.stack(means), torch.tensor([float(len(each)) for each in members.values()])


@pytest.mark.parametrize("cropped", [False, True])
def test_merging_equals_a_loop_over_patches(cropped):
    features = random_features(3, 36)
    kept = build_pruner("random", keep=0.2).select(features)
    some = kept.tile != 1  # a tile that keeps nothing
    kept = KeptTokens(kept.tokens[some], kept.tile[some], kept.patch[some])
    shown = torch.rand(3, 36, generator=torch.Generator().manual_seed(0)) > 0.3 if cropped else None
    merged = merge_dropped(kept, features, True, shown)
    tokens, size = literally_merged(kept, features, shown)
    assert torch.allclose(merged.tokens, tokens, atol=1e-5)
    assert torch.equal(merged.size, size)
    counted = merge_dropped(kept, features, False, shown)
    assert torch.equal(counted.tokens, kept.tokens)
    assert torch.equal(counted.size, size)
    alone = features.split([1, 1, 1])[2]
    third = kept.tile == 2
    one = KeptTokens(kept.tokens[third], kept.tile[third] * 0, kept.patch[third])
    one = merge_dropped(one, alone, True, None if shown is None else shown[2:])
    assert torch.equal(one.tokens, merged.tokens[third])


@pytest.mark.parametrize("name", ["visionzip", "prumerge", "prumerge_plus", "avgpool"])
def test_methods_that_merge_say_how_many(name):
    features = random_features(3, 144)
    kept = build_pruner(name, keep=0.2).select(features)
    per_tile = torch.zeros(3).index_add(0, kept.tile, kept.size)
    cls = name == "visionzip"  # which stands for itself
    assert torch.allclose(per_tile, torch.full((3,), 144.0 + cls), atol=1e-3)
    assert (kept.size > 0).all()
    with pytest.raises(ValueError, match="merges what it drops by itself: leave out merge"):
        build_pruner(name, keep=0.2, merge=True)


def test_what_cannot_weigh_says_so(pair, monkeypatch):
    model = pair("v15")[0][0]
    attach(model, "none")
    method = build_pruner("avgpool", keep=0.5, weigh=True)
    config = model.get_decoder().config
    for name, value, said in (
        ("_attn_implementation_internal", "flash_attention_2", "flash_attention_2 does not take"),
        ("sliding_window", 4096, "sliding_window=4096"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(config, name, value, raising=False)
            with pytest.raises(ValueError, match=said):
                model.pruner = method
            with pytest.raises(ValueError, match=said):
                attach(model, method)
    with monkeypatch.context() as patch:
        patch.setattr("transformers.__version__", "4.37.2")
        with pytest.raises(ValueError, match="weigh=True needs transformers 5"):
            model.pruner = method
    with monkeypatch.context() as patch:
        patch.setattr("llava_hivtp.weighing.DECODERS", ("MistralModel",))
        with pytest.raises(ValueError, match="not supported in a LlavaLlamaModel"):
            model.pruner = method
    assert type(model.pruner) is Pruner


def test_every_column_of_the_kept_tokens_is_cut_by_image():
    features = random_features(3, 36)
    kept = build_pruner("visionzip", keep=0.2, layers=(23,)).select(features)
    kept = replace(kept, tile=kept.tile.sort().values)
    first, second = kept.split([1, 2])
    for field in fields(KeptTokens):
        whole = getattr(kept, field.name)
        parts = getattr(first, field.name), getattr(second, field.name)
        if field.name != "tile":
            assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("family", ["official", "transformers"])
def test_a_method_inside_the_language_model_reads_weighed_keys(pair, photo, family):
    """Behind a layer with nothing dropped as without it; what is dropped is dropped row by row."""
    model, call = asked(pair, photo, family, "next", "ragged")
    encoder = "uniform:keep=0.2,merge=True,weigh=True"
    attach(model, build_pruner(METHOD[0], **METHOD[1]))
    plain = call()
    attach(model, build_pruner("fastv", after=(1,), keep=1.0, encoder=encoder))
    assert all(map(torch.equal, call().logits, plain.logits))
    attach(model, build_pruner("fastv", after=(1,), keep=0.5, encoder=encoder))
    together = call()
    _, alone = asked(pair, photo, family, "next", "one")
    assert torch.equal(alone().sequences[0], together.sequences[0])
    assert not torch.allclose(together.logits[0], plain.logits[0], atol=1e-4)
