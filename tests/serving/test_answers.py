"""The engine answers as transformers does with the same kept features."""

from __future__ import annotations

import pytest
from conftest import engine

ONE = "USER: <image>\nWhat is it? ASSISTANT:"
TWO = "USER: <image>\nand <image>\nWhich? ASSISTANT:"
TEXT = "USER: Hello, who are you? ASSISTANT:"
# Single images, an order and its reverse, the same image twice, no image.
CASES = [(ONE, [i]) for i in range(6)]
CASES += [(TWO, [0, 1]), (TWO, [1, 0]), (TWO, [3, 3]), (TWO, [2, 4]), (TEXT, [])]

HIVTP = {"pruner": "hivtp", "r": 2, "k": 25, "c": 2, "layers": [2, 3], "fill": True}
V15 = {
    "stock": None,
    "none": {"pruner": "none"},
    "hivtp": HIVTP,
    "random": {"pruner": "random", "keep": 0.25, "seed": 3},
    "visionzip": {"pruner": "visionzip", "keep": 0.4, "layers": [5]},
    "divprune": {"pruner": "divprune", "keep": 0.25},
    "cover": {"pruner": "cover", "keep": 0.25, "layers": [5]},
}
NEXT = {
    "stock": None,
    "none-inside": {"pruner": "none", "layout": "inside"},
    "hivtp-inside": {**HIVTP, "layout": "inside"},
    "hivtp-mosaic": {**HIVTP, "c": None, "layout": "mosaic"},
    "random-inside": {"pruner": "random", "keep": 0.25, "layout": "inside"},
    "hired-mosaic": {"pruner": "hired", "keep": 0.3, "layers": [1, 5], "layout": "mosaic"},
    "visionzip-mosaic": {"pruner": "visionzip", "keep": 0.4, "layers": [5], "layout": "mosaic"},
}
ENGINES = [("v15", name) for name in V15] + [("next", name) for name in NEXT]


def ask(llm, pictures, cases, lora=None, **sampling):
    from vllm import SamplingParams

    prompts = [
        {"prompt": prompt, "multi_modal_data": {"image": [pictures[i] for i in which]}}
        if which
        else {"prompt": prompt}
        for prompt, which in cases
    ]
    given = {"temperature": 0, "max_tokens": 8, "ignore_eos": True, "logprobs": 10}
    sampling = SamplingParams(**given | sampling)
    return llm.generate(prompts, sampling, lora_request=lora, use_tqdm=False)


def check(output, expected):
    length, tokens, steps = expected
    (answer,) = output.outputs
    assert len(output.prompt_token_ids) == length
    assert list(answer.token_ids) == tokens
    for found, wanted in zip(answer.logprobs, steps, strict=True):
        for token, value in found.items():
            assert value.logprob == pytest.approx(float(wanted[token]), abs=1e-3)


@pytest.mark.parametrize(("kind", "name"), ENGINES)
def test_answers_are_those_of_transformers(checkpoint, pictures, kind, name):
    from reference import Reference

    folder, settings = checkpoint(kind), (V15 if kind == "v15" else NEXT)[name]
    reference = Reference(folder, settings)
    expected = [reference.ask(prompt, [pictures[i] for i in which]) for prompt, which in CASES]
    assert len({tuple(tokens) for _, tokens, _ in expected}) > len(CASES) // 2
    # Images are longer than a step's tokens: prefill is chunked.
    with engine(folder, settings, max_num_batched_tokens=32) as llm:
        for output, wanted in zip(ask(llm, pictures, CASES), expected, strict=True):
            check(output, wanted)
        again = ask(llm, pictures, CASES[::-1])  # caches of prefixes, images and pixels are warm
        assert any(output.num_cached_tokens for output in again)
        for output, wanted in zip(again, expected[::-1], strict=True):
            check(output, wanted)
        llm.reset_prefix_cache()
        for case, wanted in list(zip(CASES, expected, strict=True))[5:7]:
            (output,) = ask(llm, pictures, [case])
            check(output, wanted)
