"""One model in many hands: threads, copies, pickles, compilers, subclasses."""

from __future__ import annotations

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from ask import METHODS, prompt_ids
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from PIL import Image

from llava_hivtp import PRUNERS, attach, detach, load
from llava_hivtp.families.base import Pruned
from llava_hivtp.images import prepare_images
from llava_hivtp.pruners import Pruner
from llava_hivtp.vision import KeptTokens

ASK = "USER: <image>\nWhat? ASSISTANT:"


class Mine(LlavaLlamaForCausalLM):
    """A user's subclass of a stock class."""

    def greet(self):
        return "hello"


@pytest.fixture(scope="module")
def small(tiny):
    """(model, requests): AnyRes, and keyword arguments of `generate` for images of four sizes."""
    model, tokenizer, processor, _ = load(tiny(anyres=True), device_map="cpu")
    requests = []
    for i, size in enumerate([(112, 90), (56, 56), (160, 50), (60, 120)]):
        noise = torch.randint(0, 256, (7, 7, 3), generator=torch.Generator().manual_seed(i))
        image = Image.fromarray(noise.to(torch.uint8).numpy()).resize(size)
        pixels, sizes = prepare_images([image], processor, model.config)
        ids, _ = prompt_ids(tokenizer, ASK)
        requests.append({"inputs": ids, "images": pixels, "image_sizes": sizes})
    return model, requests


def ask(model, request):
    tokens = model.generate(**request, max_new_tokens=2, do_sample=False, pad_token_id=0)
    return tokens.tolist(), model.kept[0].kept.patch.tolist(), model.kept[0].patches


def in_threads(work, calls=50):
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(work, call) for call in range(8 * calls)]
        return [job.result() for job in jobs]


def test_eight_threads_swap_methods_under_the_models_lock(small):
    model, requests = small
    names = [(name, i) for name in METHODS for i in range(len(requests))]
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    stock = ask_stock(model, requests)

    def single(which):
        name, i = names[which % len(names)]
        with model.lock:
            model.pruner = METHODS[name]
            return which, ask(model, requests[i])

    alone = {which: single(which)[1] for which in range(len(names))}
    answers = in_threads(single)
    assert len(answers) == 400
    for which, answer in answers:
        assert answer == alone[which % len(names)]
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(weight, after[name]) for name, weight in state.items())
    assert ask_stock(model, requests) == stock


def ask_stock(model, requests):
    detach(model)
    try:
        return [model.generate(**r, max_new_tokens=2, pad_token_id=0).tolist() for r in requests]
    finally:
        attach(model)


def test_threads_without_the_lock_see_their_own_images(small):
    model, requests = small
    model.pruner = METHODS["hivtp"]
    alone = [ask(model, request) for request in requests]
    encoded = [model.encode_images(r["images"], r["image_sizes"])[0] for r in requests]

    def work(which):
        i = which % len(requests)
        assert ask(model, requests[i]) == alone[i]
        (tokens,) = model.encode_images(requests[i]["images"], requests[i]["image_sizes"])
        assert torch.equal(tokens, encoded[i])
        assert torch.equal(model.kept[0].tokens, encoded[i])

    in_threads(work, calls=15)
    assert model.config.tokenizer_padding_side == "right"


def test_a_subclass_of_a_stock_class_is_attached_and_pickled(small, tiny):
    requests = small[1]
    # One of its own: transformers leaves hooks that cannot be pickled where stock LLaVA ran.
    model = load(tiny(anyres=True), METHODS["hivtp"], device_map="cpu")[0]
    answer = ask(model, requests[0])
    mine = copy.deepcopy(detach(model))
    attach(model, METHODS["hivtp"])
    mine.__class__ = Mine
    assert ask(attach(mine, METHODS["hivtp"]), requests[0]) == answer
    assert mine.greet() == "hello"
    for twin in (pickle.loads(pickle.dumps(mine)), copy.deepcopy(mine), saved(mine)):
        assert type(twin) is type(mine)
        assert twin.kept == ()
        assert ask(twin, requests[0]) == answer
        assert type(detach(twin)) is Mine
    assert type(detach(mine)) is Mine
    twin = pickle.loads(pickle.dumps(model))
    assert type(twin) is type(model)
    assert ask(twin, requests[0]) == answer


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_a_model_is_copied_after_a_training_step_and_gradients_flow(small):
    model, requests = small
    model.pruner = METHODS["hivtp"]
    request = dict(requests[0])
    request["input_ids"] = request.pop("inputs")
    loss = model(**request, labels=request["input_ids"].clamp(min=0)).loss
    twin = copy.deepcopy(model)
    assert not model.kept[0].tokens.requires_grad
    loss.backward()
    gradients = [p.grad for p in model.get_model().mm_projector.parameters()]
    model.zero_grad(set_to_none=True)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    assert ask(twin, requests[0]) == ask(model, requests[0])


@pytest.mark.slow
def test_it_compiles_as_the_stock_class_does(small):
    model, requests = small
    model.pruner = METHODS["hivtp"]
    request = dict(requests[0])
    request["input_ids"] = request.pop("inputs")
    with torch.no_grad():
        want = model(**request).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager")
        assert torch.equal(compiled(**request).logits, want)
    assert ask(compiled, requests[0]) == ask(model, requests[0])


class Greedy(Pruner):
    """Keeps all and promises half."""

    def budget(self, n_tiles, n_patches):
        return n_tiles * n_patches // 2


class GreedyByTile(Greedy):
    by_tile = True


class Mask(Pruner):
    def select(self, features):
        kept = super().select(features)
        return KeptTokens(kept.tokens, kept.tile, kept.patch >= 0)


class Tokens(Pruner):
    def select(self, features):
        return features.tokens[0]


class Ragged(Pruner):
    def select(self, features):
        kept = super().select(features)
        return KeptTokens(kept.tokens, kept.tile[:-1], kept.patch)


@pytest.mark.parametrize("cls", [Greedy, GreedyByTile])
def test_an_image_over_budget_is_named(small, cls):
    model, requests = small
    model.pruner = cls()
    images = [requests[1]["images"][0], requests[0]["images"][0]]
    sizes = [requests[1]["image_sizes"][0], requests[0]["image_sizes"][0]]
    tiles = len(images[0])
    message = f"{cls.__name__} kept {16 * tiles} tokens of image 0 .*its budget of {8 * tiles}"
    with pytest.raises(ValueError, match=message):
        model.encode_images(images, sizes)


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Mask, "patch .P,., got .*torch.bool"),
        (Tokens, "KeptTokens, got Tensor"),
        (Ragged, "whole numbers tile"),
    ],
)
def test_what_a_method_returns_is_checked(small, cls, message):
    model, requests = small
    model.pruner = cls()
    with pytest.raises(TypeError, match=message):
        model.encode_images(requests[0]["images"], requests[0]["image_sizes"])


def test_a_class_says_for_itself_whether_it_chooses_by_tile():
    class Other(PRUNERS["hivtp"]):
        pass

    assert PRUNERS["hivtp"].by_tile
    assert not Other.by_tile
    assert not Other().by_tile
    assert issubclass(Pruned.classes[LlavaLlamaForCausalLM], LlavaLlamaForCausalLM)
