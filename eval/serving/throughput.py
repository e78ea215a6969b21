"""Requests per second and KV cache per request, with and without pruning, in one run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from eval.clock import Spread, interleave, ratios
from eval.efficiency.device import ceilings
from eval.efficiency.ideal import Ceilings, RequestSizes, request_seconds
from eval.machine import columns, version
from eval.markdown import pipes
from eval.serving.engine import Batch, Engine, Load
from eval.untrained.shapes import Shape
from llava_hivtp.pruners import build_pruner

STOCK = "stock vLLM"
OFF = "plug-in installed, off"
LAYERS = [7, 8, 9, 10]
CASES: dict[str, dict[str, Any] | None] = {
    STOCK: None,
    OFF: None,
    "none, 100 %": {"pruner": "none"},
    "hivtp, 50 %": {"r": 2, "k": 25, "c": 2, "layers": LAYERS},
    "hivtp, 25 %": {"r": 2, "k": 25, "c": None, "layers": LAYERS},
}


def measure(shape: Shape, load: Load, rounds: int, device: torch.device) -> str:
    """The report, in Markdown: all engines side by side, batches interleaved."""
    on_cpu = device.type == "cpu"
    reached = ceilings(device, getattr(torch, load.dtype), on_cpu)
    with ExitStack() as stack:
        engines = {}
        for name, hivtp in CASES.items():
            engines[name] = Engine(load, hivtp, plug_in=name != STOCK)
            stack.callback(engines[name].close)
        batches = interleave({name: each.run for name, each in engines.items()}, rounds)
    return _report(shape, load, batches, reached, device)


def ideal_seconds(shape: Shape, load: Load, kept: int, prompt: int, reached: Ceilings) -> float:
    """Least time of a batch whose requests run through every stage together."""
    sizes = RequestSizes(load.requests, 1, shape.tower.layers - 1, kept, prompt)
    itemsize = getattr(torch, load.dtype).itemsize
    return request_seconds(shape, sizes, itemsize, reached, load.new)


def _kept(shape: Shape, hivtp: dict[str, Any] | None) -> int:
    arguments = dict(hivtp or {"pruner": "none"})
    pruner = build_pruner(arguments.pop("pruner", "hivtp"), **arguments)
    return pruner.budget(1, shape.tower.patches)


def _report(
    shape: Shape,
    load: Load,
    batches: Mapping[str, Sequence[Batch]],
    reached: Ceilings,
    device: torch.device,
) -> str:
    on_cpu = device.type == "cpu"
    clock = "cpu_seconds" if on_cpu else "seconds"
    times = {name: [getattr(b, clock) for b in each] for name, each in batches.items()}
    least = {
        name: ideal_seconds(shape, load, _kept(shape, CASES[name]), each[0].prompt, reached)
        for name, each in batches.items()
    }
    rows = [
        ["case", "prompt tokens", "requests/s", "/ stock", "ideal", "KV cache per request", "fit"]
    ]
    for name, each in batches.items():
        batch = each[0]
        used = math.ceil((batch.prompt + load.new - 1) / batch.block)
        rows.append(
            [
                name,
                str(batch.prompt),
                _spread(Spread.of(load.requests / t for t in times[name]), 3),
                _spread(ratios(times[STOCK], times[name]), 2),
                f"{least[STOCK] / least[name]:.2f}",
                f"{used * batch.cache / batch.blocks / 2**20:.2f} MiB",
                f"{batch.blocks // used}",
            ]
        )
    return f"{_heading(shape, load, len(each), reached, device)}\n\n{pipes(rows, 1)}\n"


def _heading(shape: Shape, load: Load, rounds: int, reached: Ceilings, device: torch.device) -> str:
    tower, engine = shape.tower, version("vllm")
    machine = "; ".join(f"{key} {value}" for key, value in columns(device).items() if value)
    clock = (
        "Requests per second that the engine's process worked: others used the machine meanwhile."
        if device.type == "cpu"
        else "Requests per second of wall time."
    )
    return (
        f"## LLaVA-1.5 in vLLM {engine}, random weights\n\n"
        f"Language model {shape.layers} layers of width {shape.width}, tower {tower.layers} of "
        f"{tower.width}, {load.dtype}; {load.requests} requests at a time, each with a new image "
        f"and {load.new} new tokens; {rounds} interleaved rounds, medians with quartiles, ratios "
        f"paired round by round. {clock} Ideal: the least time of such a batch at "
        f"{reached.flops / 1e9:.0f} GFLOP/s and {reached.bytes / 1e9:.0f} GB/s, both measured "
        f"here. Fit: such requests that {load.cache / 2**20:.0f} MiB of KV cache take.\n\n"
        f"{machine}"
    )


def _spread(spread: Spread, digits: int) -> str:
    numbers = (f"{x:.{digits}f}" for x in (spread.median, spread.low, spread.high))
    return "{} ({}-{})".format(*numbers)
