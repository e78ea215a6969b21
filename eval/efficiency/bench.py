"""Build a model, serve requests in turn, collect what they took."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from eval.efficiency.graphs import Graphs
from eval.efficiency.ideal import Ceilings, Request
from eval.efficiency.measure import (
    Spread,
    ceilings,
    interleave,
    peak_bytes,
    plan_nothing,
    timed,
)
from eval.efficiency.report import Result, Setting
from eval.efficiency.request import (
    Case,
    Inputs,
    Run,
    make_inputs,
    random_picture,
    run_request,
    sizes_of,
)
from eval.efficiency.shapes import random_model, shape, shape_of
from eval.plan.table import Row
from llava_hivtp.images import prepare_images
from llava_hivtp.pruners import build_pruner

Found = TypeVar("Found")


@dataclass
class Bench:
    """A model on its device, and how to measure it."""

    name: str
    model: Any
    processor: Any
    device: torch.device
    dtype: torch.dtype
    text: int  # prompt tokens beside the image
    rounds: int
    new_tokens: tuple[int, ...]
    cpu_time: bool
    graphs: Graphs | None
    ceilings: Ceilings

    @classmethod
    def build(
        cls,
        path: str,
        random: str,
        layers: int | None,
        device: str,
        dtype: str,
        attention: str,
        cpu_time: bool,
        graphs: bool,
        **options: Any,
    ) -> Bench:
        """Load the checkpoint at `path`, or build the published shape `random`."""
        if bool(path) == bool(random):
            raise ValueError("give a checkpoint or --random-weights, one of the two")
        plan_nothing()
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        kind = getattr(torch, dtype or ("float16" if place.type == "cuda" else "float32"))
        if random:
            model, processor = random_model(shape(random, layers), str(place), kind, attention)
        else:
            from llava_hivtp import load

            model, _, processor, _ = load(
                path, dtype=kind, device_map=str(place), attn_implementation=attention
            )
        limits = ceilings(place, kind, cpu_time)
        options |= {"cpu_time": cpu_time, "ceilings": limits}
        options["graphs"] = Graphs(model) if graphs else None
        return cls(random or path, model, processor, place, kind, **options)

    def measure(
        self, cases: Sequence[Case], size: tuple[int, int], batch: int, until: float = math.inf
    ) -> list[Result]:
        """All cases on one image size and batch, in turn, until `rounds` or `until`."""
        inputs = make_inputs(self.model, self.processor, size, batch, self.text)
        cases = _that_differ(cases, inputs)
        longest = max(self.new_tokens)
        counted = {case.label: self._count(case, inputs) for case in cases}
        serve = {case.label: partial(self.serve, case, inputs, longest) for case in cases}
        # On a CPU the two counted requests were warm-up enough.
        found = interleave(serve, self.rounds, int(self.device.type == "cuda"), until)
        setting = Setting(
            self.name,
            shape_of(self.model),
            str(self.dtype).removeprefix("torch."),
            self.dtype.itemsize,
            size,
            self.text,
            self.ceilings,
        )
        return [
            Result(setting, case, tuple(found[case.label]), *counted[case.label]) for case in cases
        ]

    def serve(self, case: Case, inputs: Inputs, new_tokens: int) -> Run:
        """One request."""
        return run_request(self.model, case, inputs, new_tokens, self.cpu_time, self.graphs)

    def _count(self, case: Case, inputs: Inputs) -> tuple[Request, int, int]:
        """Sizes, peak bytes and FLOPs of a request for one token, as `model.generate` serves it."""
        once = partial(run_request, self.model, case, inputs, 1)
        peak = peak_bytes(once, self.device)
        run, flops = count_flops(once)
        return sizes_of(self.model, case, inputs, run), peak, flops

    def preparing(self, size: tuple[int, int]) -> str:
        """What LLaVA's preprocessing takes: equal for all methods, and no part of TTFT."""
        pictures = [random_picture(size)]
        prepare = partial(prepare_images, pictures, self.processor, self.model.config)
        seconds = Spread.of(timed(prepare, self.device, self.cpu_time) for _ in range(5))
        return f"Preparing the pixels of an image takes {1e3 * seconds.median:.1f} ms besides."

    def rooms(self, results: Iterable[Result]) -> Iterator[str]:
        """Most requests at once that fit the GPU, stock LLaVA's first and the ratio to it."""
        base = 0
        for result in results:
            case = result.case
            if case.name == "none":
                continue
            torch.cuda.empty_cache()
            room = torch.cuda.mem_get_info(self.device)[0]
            guess = room * result.request.batch // result.peak
            most = largest(partial(self._fits, case, result.setting.size), max(1, guess))
            base = base or max(1, most)
            yield f"Largest batch that fits, {case.label}: {most} ({most / base:.2f} of stock's)."

    def _fits(self, case: Case, size: tuple[int, int], batch: int) -> bool:
        try:
            inputs = make_inputs(self.model, self.processor, size, batch, self.text)
            run_request(self.model, case, inputs, 2)
        except RuntimeError as error:  # not only PyTorch's own: libraries allocate, too
            if not re.search("out of memory|ALLOC_FAILED", str(error)):
                raise
            return False
        finally:
            torch.cuda.empty_cache()
        return True


def largest(fits: Callable[[int], bool], guess: int) -> int:
    """Largest number that fits, within an eighth of it: up or down from a guess."""
    count = guess
    if fits(count):
        while fits(more := count + max(1, count // 8)):
            count = more
        return count
    while count := count - max(1, count // 8):
        if fits(count):
            return count
    return 0


def table_cases(rows: Iterable[Row], layouts: Sequence[str]) -> list[Case]:
    """The rows of a table, each under every layout."""
    return [
        Case(row.id, row.build(), layout, row.block)
        for layout in layouts
        for row in rows
        if row.pruner != "none"
    ]


def spelled_cases(methods: Iterable[str], layouts: Sequence[str]) -> list[Case]:
    """Methods as a command line spells them: `hivtp:r=2,k=14,c=3`."""
    cases = []
    for spelled in methods:
        name, _, arguments = spelled.partition(":")
        pairs = [pair.partition("=")[::2] for pair in arguments.split(",") if pair]
        pruner = build_pruner(name, **dict(pairs))
        block = round(100 * pruner.budget(1, 576) / 576)
        cases += [Case(spelled, pruner, layout, block) for layout in layouts]
    return cases


def bases(layouts: Sequence[str]) -> list[Case]:
    """What every method is compared with: stock LLaVA, and nothing pruned on our own path."""
    return [Case("stock", None), *(Case("none", build_pruner("none"), each) for each in layouts)]


def count_flops(run: Callable[[], Found]) -> tuple[Found, int]:
    """What a call returns, and its FLOPs as torch counts them: none of a Triton kernel."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={attention: _sdpa_flops}) as counter:
        found = run()
    return found, counter.get_total_flops()


def _sdpa_flops(query: Any, key: Any, value: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)  # torch knows this formula on GPUs only


def _that_differ(cases: Sequence[Case], inputs: Inputs) -> list[Case]:
    """One tile has no layout: leave its repetitions out."""
    if inputs.tiles > 1:
        return list(cases)
    return list({case.name: replace(case, layout="unpad") for case in reversed(cases)}.values())[
        ::-1
    ]
