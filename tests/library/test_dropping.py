"""Methods inside the language model against an engine that deletes rows by hand."""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import cache

import pytest
import torch
from torch.nn.functional import silu
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from llava_hivtp.dropping import dropping
from llava_hivtp.pruners import LAYER_PRUNERS, build_pruner

LAYERS, WIDTH, HEADS, GROUPS = 5, 32, 4, 2
METHODS = [
    ("fastv", {"after": (2,), "keep": 0.3}),
    ("fastv", {"after": (1,), "keep": 0.1}),
    ("fastv", {"after": (2,), "keep": 0.3, "packed": True}),
    ("pdrop", {"after": (1, 2, 4), "keep": (0.6, 0.4, 0.2)}),
    ("pdrop", {"after": (1, 3), "keep": (0.5, 0.2), "packed": False}),
    ("sparsevlm", {"after": (1, 2, 4), "keep": (0.6, 0.4, 0.2)}),
    ("sparsevlm", {"after": (2,), "keep": 0.3, "packed": False}),
    ("dart", {"after": (2,), "keep": 0.5}),
    ("dart", {"after": (1,), "keep": 0.4, "image_pivots": 2, "text_pivots": 1}),
]
every_method = pytest.mark.parametrize(
    ("name", "arguments"), METHODS, ids=[f"{n}:{a}" for n, a in METHODS]
)


DECODERS = {
    "llama": (LlamaForCausalLM, LlamaConfig),
    "mistral": (MistralForCausalLM, MistralConfig),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config),
}


@pytest.fixture(scope="module")
def decoder():
    return cache(made)


@pytest.fixture(scope="module", params=DECODERS)
def any_model(request, decoder):
    return decoder(request.param)


@pytest.fixture
def model(decoder):
    return decoder("llama")


def made(kind):
    torch.manual_seed(3)
    shape = {
        "vocab_size": 50,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "initializer_range": 0.4,
        "eos_token_id": None,
    }
    cls, config = DECODERS[kind]
    return cls(config(**shape, sliding_window=None)).eval()


# ---------------------------------------------------------------- the engine that deletes by hand


class Engine:
    """One row, one token at a time; every layer has lists of the keys and values it still sees."""

    def __init__(self, model, name, arguments):
        self.model, self.name = model, name
        self.method = build_pruner(name, **arguments)

    def rope(self, x, place):
        half = x.shape[-1] // 2
        angles = [place / 10000 ** (2 * i / x.shape[-1]) for i in range(half)]
        cos, sin = (
            torch.tensor([math.cos(a) for a in angles]),
            torch.tensor([math.sin(a) for a in angles]),
        )
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def heads(self, layer, x, place):
        attention = layer.self_attn
        normed = layer.input_layernorm(x)
        q, k, v = (
            getattr(attention, name)(normed).view(-1, WIDTH // HEADS)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        k, v = k.repeat_interleave(HEADS // GROUPS, 0), v.repeat_interleave(HEADS // GROUPS, 0)
        return self.rope(q, place), self.rope(k, place), v

    def layer(self, index, x, place):
        """Row x at a place through a layer, whose cache it joins."""
        layer = self.model.model.layers[index]
        q, k, v = self.heads(layer, x, place)
        self.cache[index].append((k, v))
        weights = self.weights(q, [k for k, _ in self.cache[index]])
        mixed = sum(w[:, None] * v for w, (_, v) in zip(weights.T, self.cache[index], strict=True))
        x = x + layer.self_attn.o_proj(mixed.flatten())
        y = layer.post_attention_layernorm(x)
        mlp = layer.mlp
        return x + mlp.down_proj(silu(mlp.gate_proj(y)) * mlp.up_proj(y))

    def weights(self, q, keys):
        logits = torch.stack([(q * k).sum(1) for k in keys], 1) / math.sqrt(WIDTH // HEADS)
        return logits.softmax(1)  # (H, keys)

    def keep(self, layer, rows, count):
        """Which of the image's rows stay behind a layer, as a set of indices into rows."""
        image = [i for i, row in enumerate(rows) if row["image"]]
        if self.name == "dart":
            return self.dart(layer, rows, image, count)
        of = layer + 1 if self.name == "pdrop" else layer
        source = [row["before"] if of == layer else row["x"] for row in rows]
        made = [
            self.heads(self.model.model.layers[of - 1], x, row["place"])
            for x, row in zip(source, rows, strict=True)
        ]
        asked = self.raters(rows) if self.name == "sparsevlm" else [len(rows) - 1]
        weights = torch.zeros(len(rows))
        for i in asked:
            seen = [k for _, k, _ in made[: i + 1]]
            weights[: i + 1] += self.weights(made[i][0], seen).mean(0)
        return set(sorted(image, key=lambda i: (-float(weights[i]), i))[:count])

    def raters(self, rows):
        """Indices into rows of the text tokens that patches are most like, by the embeddings."""
        image = [x for x, i in self.prompt if i]
        first = next(i for i, (_, seen) in enumerate(self.prompt) if seen)
        text = [i for i in range(first, len(self.prompt)) if not self.prompt[i][1]]
        alike = torch.stack([torch.stack([v @ self.prompt[i][0] for i in text]) for v in image])
        told = alike.softmax(1).mean(0)
        chosen = {i for i, value in zip(text, told, strict=True) if value > told.mean()}
        return [i for i, row in enumerate(rows) if row["was"] in chosen]

    def dart(self, layer, rows, image, count):
        block = self.model.model.layers[layer - 1]
        keys = [self.heads(block, row["before"], row["place"])[1] for row in rows]
        length = [float(k.abs().sum()) for k in keys]
        text = [i for i in range(image[0], len(rows)) if i not in image]
        m = self.method
        first = sorted(image, key=lambda i: -length[i])[: m.image_pivots]
        pivots = first + sorted(text, key=lambda i: -length[i])[: m.text_pivots]
        kept = first[:count]
        rest = count - len(kept)
        normed = [self.model.model.norm(row["x"]) for row in rows]
        for i, pivot in enumerate(pivots):
            most = rest // len(pivots) + (i < rest % len(pivots))
            alike = {
                j: float(torch.cosine_similarity(normed[pivot], normed[j], dim=0))
                for j in image
                if j not in kept
            }
            kept += sorted(alike, key=lambda j: alike[j])[:most]
        return set(kept)

    @torch.no_grad()
    def generate(self, embeds, image, count):
        self.cache = [[] for _ in range(LAYERS)]
        self.prompt = [(x, bool(i)) for x, i in zip(embeds, image, strict=True)]
        rows = [
            {"x": x, "image": bool(i), "place": place, "before": None, "was": place}
            for place, (x, i) in enumerate(zip(embeds, image, strict=True))
        ]
        total, gone, dropped = int(image.sum()), [0] * LAYERS, 0
        for index in range(LAYERS):
            gone[index] = dropped if self.method.packed else 0
            for row in rows:
                row["before"], row["x"] = row["x"], self.layer(index, row["x"], row["place"])
            if index + 1 in self.method.after and total:
                share = self.method.keep[self.method.after.index(index + 1)]
                kept = self.keep(index + 1, rows, int(share * total + 1e-9))
                dropped += sum(row["image"] for row in rows) - len(kept)
                rows = [row for i, row in enumerate(rows) if not row["image"] or i in kept]
                if self.method.packed:
                    for place, row in enumerate(rows):
                        row["place"] = place
        x, place, tokens = rows[-1]["x"], len(embeds), []
        for _ in range(count):
            tokens.append(int(self.model.lm_head(self.model.model.norm(x)).argmax()))
            x = self.model.model.embed_tokens.weight[tokens[-1]]
            for index in range(LAYERS):
                x = self.layer(index, x, place - gone[index])
            place += 1
        return tokens


# ---------------------------------------------------------------- what is compared


def prompt(seed, before=3, image=20, behind=6, image2=0):
    """(S, D) embeddings and (S,) where the image is."""
    generator = torch.Generator().manual_seed(seed)
    where = torch.tensor(
        [0] * before + [1] * image + [0] * behind + [1] * image2 + [0] * bool(image2)
    )
    return torch.randn(len(where), WIDTH, generator=generator), where.bool()


def batch(rows):
    """Padded in front: embeddings, mask, image."""
    longest = max(len(x) for x, _ in rows)
    embeds = torch.zeros(len(rows), longest, WIDTH)
    mask, image = (
        torch.zeros(len(rows), longest, dtype=torch.long),
        torch.zeros(len(rows), longest).bool(),
    )
    for i, (x, where) in enumerate(rows):
        embeds[i, -len(x) :], mask[i, -len(x) :], image[i, -len(x) :] = x, 1, where
    return embeds, mask, image


def run(model, method, rows, **settings):
    embeds, mask, image = batch(rows)

    def look(count):
        return (m.repeat_interleave(count // len(rows), 0) for m in (image, mask.bool()))

    given = {} if mask.all() and settings.pop("without_mask", False) else {"attention_mask": mask}
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with dropping(model.model, method, look) if method else nullcontext() as found:
        out = model.generate(inputs_embeds=embeds, **given, **(options | settings))
    return (out.tolist() if isinstance(out, torch.Tensor) else out), found


ANSWERS = {}  # made by hand, once


def by_hand(model, name, arguments, seed, shape):
    key = (type(model), name, str(arguments), seed, shape)
    if key not in ANSWERS:
        ANSWERS[key] = Engine(model, name, arguments).generate(*prompt(seed, *shape), 6)
    return ANSWERS[key]


RAGGED = [(3, 20, 6, 0), (1, 35, 4, 0), (9, 0, 3, 0), (2, 12, 5, 9), (4, 1, 2, 0)]


@every_method
def test_tokens_equal_those_of_rows_deleted_by_hand(any_model, name, arguments):
    method = build_pruner(name, **arguments)
    for seed, shape in enumerate(RAGGED):
        if shape[1] == 1:
            continue  # a share of one token keeps none
        ours, _ = run(any_model, method, [prompt(seed, *shape)], without_mask=seed % 2 == 0)
        assert ours[0] == by_hand(any_model, name, arguments, seed, shape)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@every_method
def test_ragged_rows_answer_like_single_ones(model, name, arguments, attention):
    method = build_pruner(name, **arguments)
    rows = [prompt(seed, *shape) for seed, shape in enumerate(RAGGED[:4])]
    model.set_attn_implementation(attention)
    try:
        together, _ = run(model, method, rows)
    finally:
        model.set_attn_implementation("sdpa")
    for seed, own in enumerate(together):
        assert own == by_hand(model, name, arguments, seed, RAGGED[seed])


@every_method
def test_rows_of_equal_length_that_lose_different_numbers_get_a_mask(model, name, arguments):
    method = build_pruner(name, **arguments)
    shapes = {1: (3, 20, 6), 2: (2, 12, 15)}
    rows = [prompt(seed, *shape) for seed, shape in shapes.items()]
    for given in ({"without_mask": True}, {}):
        together, found = run(model, method, rows, **given)
        assert any(stage.ragged for stage in found.stages.values())
        for own, (seed, shape) in zip(together, shapes.items(), strict=True):
            assert own == by_hand(model, name, arguments, seed, shape)


@every_method
def test_beams_and_samples_of_a_batch_equal_those_of_single_rows(model, name, arguments):
    method = build_pruner(name, **arguments)
    rows = [prompt(seed, *shape) for seed, shape in enumerate(RAGGED[:4])]
    together, _ = run(model, method, rows, num_beams=3)
    for row, own in zip(rows, together, strict=True):
        assert own == run(model, method, [row], num_beams=3)[0][0]


@pytest.mark.parametrize("name", LAYER_PRUNERS)
def test_keeping_all_is_the_model_itself_to_the_bit(model, name):
    rows = [prompt(seed, *shape) for seed, shape in enumerate(RAGGED)]
    settings = {"return_dict_in_generate": True, "output_logits": True}
    method = LAYER_PRUNERS[name](keep=1.0, after=(1, 3))
    (dropped, found), (stock, _) = (run(model, m, rows, **settings) for m in (method, None))
    assert not found.stages
    assert torch.equal(dropped.sequences, stock.sequences)
    assert all(map(torch.equal, dropped.logits, stock.logits))


@every_method
def test_a_budget_is_exact_behind_every_layer(model, name, arguments):
    method = build_pruner(name, **arguments)
    rows = [prompt(seed, *shape) for seed, shape in enumerate(RAGGED[:4])]
    _, found = run(model, method, rows)
    totals = torch.tensor([int(where.sum()) for _, where in rows])
    for layer, part in zip(method.after, method.keep, strict=True):
        stage = found.stages[layer]
        image = found.whole.image.gather(1, stage.index) & stage.real
        assert image.sum(1).tolist() == [int(part * int(total) + 1e-9) for total in totals]
        text = found.whole.real.sum(1) - totals
        assert (stage.real.sum(1) - image.sum(1)).tolist() == text.tolist()


def test_a_cache_without_a_length_for_every_layer_is_refused(model):
    x, where = prompt(0)
    with pytest.raises(
        ValueError, match="StaticCache: dropping behind layers needs an empty Dynamic"
    ):
        run(model, LAYER_PRUNERS["fastv"](), [(x, where)], cache_implementation="static")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"after": (2, 1), "keep": 0.5}, "after must be rising layers"),
        ({"after": (), "keep": 0.5}, "after must be rising layers"),
        ({"after": (1, 2), "keep": (0.5,)}, "each with a share in keep"),
        ({"after": (1,), "keep": 0}, "keep must be a share in"),
        ({"after": (1, 2), "keep": (0.5, 0.6)}, "keep must fall"),
        ({"after": (1,), "keep": 0.5, "packed": "some"}, "packed must be true or false"),
        ({"after": "two", "keep": 0.5}, "layers must be such as"),
        ({"after": 1, "keep": 0.5, "encoder": "fastv"}, "encoder must be a method before"),
        ({"after": 1, "keep": 0.5, "encoder": "hivtp:q=2"}, "takes no q"),
        ({"after": 1, "keep": 0.5, "layers": 3}, "takes no layers"),
    ],
)
def test_a_bad_argument_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_pruner("fastv", **arguments)


def test_the_last_layer_has_nothing_behind_it():
    with pytest.raises(ValueError, match=r"FastV: layers \[5\] lie outside 1..4"):
        build_pruner("fastv", after=5).check_language(5)
