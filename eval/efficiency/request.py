"""One request, served and timed."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from eval.clock import Clock
from eval.efficiency.cases import Case
from eval.efficiency.graphs import Graphs
from eval.efficiency.ideal import RequestSizes
from eval.efficiency.inputs import Inputs
from eval.efficiency.stopwatch import Run, Stopwatch
from eval.untrained.shapes import text_config
from llava_hivtp import attach, detach
from llava_hivtp.families import family_of
from llava_hivtp.pruners import LayerPruner


def run_request(
    model: Any,
    case: Case,
    inputs: Inputs,
    new_tokens: int,
    cpu_time: bool = False,
    graphs: Graphs | None = None,
) -> Run:
    """Serve a request through `model.generate`, or through graphs, and time its stages.

    The end of sequence is switched off: every method writes exactly `new_tokens` tokens.
    """
    if graphs is not None and isinstance(case.pruner, LayerPruner):
        raise ValueError(f"{case.label} drops tokens inside the language model: no --graphs")
    choose(model, case)
    stopwatch = Stopwatch(Clock(model.device, cpu_time))
    serve = partial(_generate, model) if graphs is None else graphs.generate
    with torch.inference_mode(), stopwatch.watching(model, language=graphs is None):
        stopwatch.clock.start()
        given = inputs.given if case.pruner else as_stock(model, inputs.given)
        serve(inputs.prompt, given, new_tokens, stopwatch)
    if len(stopwatch.tokens) != new_tokens:
        raise RuntimeError(f"{case.label} wrote {len(stopwatch.tokens)} tokens, not {new_tokens}")
    return Run(stopwatch.stages(), tuple(stopwatch.tokens), stopwatch.length)


def _generate(
    model: Any, prompt: Tensor, given: dict[str, Any], new_tokens: int, stopwatch: Stopwatch
) -> None:
    model.generation_config.eos_token_id = None
    model.generate(
        prompt,
        **given,
        do_sample=False,
        max_new_tokens=new_tokens,
        pad_token_id=0,
        streamer=stopwatch,
    )


def choose(model: Any, case: Case) -> None:
    """Make the model serve this case: attach its pruner, or give the stock class back."""
    if case.pruner is None:
        detach(model)
    else:
        attach(model, case.pruner, case.layout)


def sizes_of(model: Any, case: Case, inputs: Inputs, run: Run) -> RequestSizes:
    """The sizes that a request had, for its closed forms."""
    tower = family_of(type(model)).tower_of(model)
    if case.pruner is None:  # all layers run, every token of every tile is projected
        return RequestSizes(
            inputs.batch, inputs.tiles, tower.layers, inputs.tiles * tower.patches, run.length
        )
    projected = round(sum(len(image.kept) for image in model.kept) / inputs.batch)
    read = case.pruner.per_layer(run.length - inputs.text, text_config(model).num_hidden_layers)
    lengths = tuple(inputs.text + count for count in read)
    return RequestSizes(inputs.batch, inputs.tiles, tower.read, projected, run.length, lengths)


def as_stock(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Pixels as a stock class needs them; ours casts and moves them itself."""

    def ready(value: Any) -> Any:
        if isinstance(value, list):
            return [ready(one) for one in value]
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.to(model.device, model.dtype)
        return value

    return {name: ready(value) for name, value in given.items()}
