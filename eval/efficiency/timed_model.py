"""A model on its device: serve requests in turn, collect what they took."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from eval.clock import Spread, Watch, interleave, timed
from eval.efficiency.cases import Case, that_differ
from eval.efficiency.comparison import Result, Setting
from eval.efficiency.device import ceilings, chosen, leave_out_cudnn_attention, peak_bytes
from eval.efficiency.graphs import Graphs
from eval.efficiency.ideal import Ceilings, RequestSizes
from eval.efficiency.inputs import Inputs, make_inputs, random_picture
from eval.efficiency.request import run_request, sizes_of
from eval.efficiency.settings import Settings
from eval.efficiency.stopwatch import Run
from eval.untrained.models import random_model
from eval.untrained.shapes import shape, shape_of, text_config
from llava_hivtp import attach, load
from llava_hivtp.answer import prepare_pixels

Found = TypeVar("Found")


@dataclass
class TimedModel:
    """A model and how to measure it."""

    settings: Settings
    model: Any
    device: torch.device
    dtype: torch.dtype
    graphs: Graphs | None
    ceilings: Ceilings

    @classmethod
    def build(cls, settings: Settings) -> TimedModel:
        """Load the checkpoint, or build the published shape."""
        device, dtype = chosen(settings.device, settings.dtype)
        leave_out_cudnn_attention()
        if settings.random_weights:
            wanted = shape(settings.random_weights, settings.layers)
            model, _ = random_model(wanted, str(device), dtype, settings.attention)
        else:
            model, *_ = load(
                settings.model,
                dtype=dtype,
                device_map=str(device),
                attn_implementation=settings.attention,
            )
        for layout in settings.layouts:
            attach(model, layout=layout)  # refuses one that this model cannot have
        graphs = Graphs(model) if settings.graphs else None
        limits = ceilings(device, dtype, settings.cpu_time)
        return cls(settings, model, device, dtype, graphs, limits)

    @property
    def patches(self) -> int:
        """N, per tile."""
        return self.model.tower_of(self.model).patches

    @property
    def depth(self) -> int:
        """Layers of the language model."""
        return text_config(self.model).num_hidden_layers

    @property
    def counts_work(self) -> bool:
        """Whether times are what this process worked, not what passed."""
        return self.settings.cpu_time and self.device.type == "cpu"

    def measure(
        self, cases: Sequence[Case], size: tuple[int, int], batch: int, until: float = math.inf
    ) -> list[Result]:
        """All cases on one image size and batch, in turn, until all rounds are done or `until`."""
        inputs = make_inputs(self.model, size, batch, self.settings.text)
        cases = that_differ(cases, inputs.tiles)
        longest = max(self.settings.new_tokens)
        counted = {case.label: self._count(case, inputs) for case in cases}
        serve = {case.label: partial(self.serve, case, inputs, longest) for case in cases}
        # On a CPU the two counted requests were warm-up enough.
        warmup, watch = int(self.device.type == "cuda"), Watch(self.device)
        found = interleave(serve, self.settings.rounds, warmup, until, watch)
        setting = self._setting(size, watch)
        return [
            Result(setting, case, tuple(found[case.label]), *counted[case.label]) for case in cases
        ]

    def serve(self, case: Case, inputs: Inputs, new_tokens: int) -> Run:
        """One request."""
        cpu_time = self.settings.cpu_time
        return run_request(self.model, case, inputs, new_tokens, cpu_time, self.graphs)

    def preparing(self, size: tuple[int, int]) -> str:
        """What LLaVA's preprocessing takes: equal for all methods, and no part of TTFT."""
        attach(self.model)  # a stock class does not say how it is asked
        prepare = partial(prepare_pixels, self.model, [random_picture(size)])
        seconds = Spread.of(timed(prepare, self.device, self.settings.cpu_time) for _ in range(5))
        return f"Preparing the pixels of an image takes {1e3 * seconds.median:.1f} ms besides."

    def largest_batches(self, results: Iterable[Result]) -> Iterator[str]:
        """Most requests at once that fit the GPU, stock LLaVA's first and the ratio to it."""
        base = 0
        for result in results:
            case = result.case
            if case.name == "none":
                continue
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info(self.device)[0]
            guess = free * result.request.batch // result.peak
            most = largest(partial(self._fits, case, result.setting.size), max(1, guess))
            base = base or max(1, most)
            yield f"Largest batch that fits, {case.label}: {most} ({most / base:.2f} of stock's)."

    def _setting(self, size: tuple[int, int], watch: Watch) -> Setting:
        return Setting(
            model=self.settings.random_weights or self.settings.model,
            shape=shape_of(self.model),
            dtype=str(self.dtype).removeprefix("torch."),
            itemsize=self.dtype.itemsize,
            size=size,
            text=self.settings.text,
            ceilings=self.ceilings,
            worked_share=watch.share,
            # Where work is counted, what others take does not count.
            warnings=() if self.counts_work else tuple(watch.warnings()),
        )

    def _count(self, case: Case, inputs: Inputs) -> tuple[RequestSizes, int, int]:
        """Sizes, peak bytes and FLOPs of a request for one token, as `model.generate` serves it."""
        once = partial(run_request, self.model, case, inputs, 1)
        peak = peak_bytes(once, self.device)
        run, flops = count_flops(once)
        return sizes_of(self.model, case, inputs, run), peak, flops

    def _fits(self, case: Case, size: tuple[int, int], batch: int) -> bool:
        try:
            inputs = make_inputs(self.model, size, batch, self.settings.text)
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


def count_flops(run: Callable[[], Found]) -> tuple[Found, int]:
    """What a call returns, and its FLOPs as torch counts them: none of a Triton kernel."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={attention: _sdpa_flops}) as counter:
        found = run()
    return found, counter.get_total_flops()


def _sdpa_flops(query: Any, key: Any, value: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)  # torch knows this formula on GPUs only
