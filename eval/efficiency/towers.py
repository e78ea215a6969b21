"""One random vision tower, called as stock LLaVA does, as this library does, and for its maps."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from eval.clock import Clock, Spread, Watch, interleave, ratios, synchronize, timed
from eval.efficiency.device import ceilings, leave_out_cudnn_attention, peak_bytes
from eval.markdown import pipes
from eval.untrained.models import random_tower
from eval.untrained.shapes import Encoder
from llava_hivtp import importance
from llava_hivtp.pruners import HIVTP
from llava_hivtp.vision import VisionFeatures, encode_tiles, encoder_of

CALLS = 50  # of the kernel at a time: one takes no longer than its launch
TILES = (1, 5, 80)  # of the memory table: one image, one of AnyRes, sixteen of AnyRes


@dataclass
class Towers:
    """One random tower, to be called in three ways."""

    stock: nn.Module
    eager: nn.Module  # sharing its weights: attention maps need eager attention
    pruner: HIVTP
    depth: int
    device: torch.device
    cpu_time: bool

    @classmethod
    def build(
        cls, encoder: Encoder, device: torch.device, dtype: torch.dtype, cpu_time: bool
    ) -> Towers:
        """Random weights of an encoder's shape."""
        leave_out_cudnn_attention()
        torch.manual_seed(0)
        stock = random_tower(encoder).to(device, dtype).requires_grad_(False)
        with torch.device("meta"):
            eager = random_tower(encoder, "eager")
        eager.load_state_dict(stock.state_dict(), assign=True)
        for name, buffer in stock.named_buffers():  # position ids are in no state
            eager.get_submodule(name.rpartition(".")[0])._buffers[name.rpartition(".")[2]] = buffer
        return cls(stock, eager, HIVTP(), encoder.layers - 1, device, cpu_time)

    def compare(self, tiles: int, rounds: int) -> list[dict[str, Any]]:
        """Rows of the three ways, of the parts that are the library's own, and of the net cost."""
        side = self.stock.config.image_size
        dtype = next(self.stock.parameters()).dtype
        pixels = torch.randn(tiles, 3, side, side, device=self.device).to(dtype)
        ways = {
            "stock tower": partial(self.stock_way, pixels),
            "tower, tap, score, select": partial(self.own_way, pixels),
            "output_attentions=True": partial(self.maps_way, pixels),
        }
        watch = Watch(self.device)
        times = interleave(ways, rounds, watch=watch)
        counts_work = self.cpu_time and self.device.type == "cpu"
        warnings = "" if counts_work else "; ".join(watch.warnings())
        stock, own, _ = times.values()
        base = [run["all"] for run in stock]
        seconds = {name: [run["all"] for run in runs] for name, runs in times.items()}
        seconds |= {name: [run[name] for run in own] for name in ("tap", "score + select")}
        seconds["gross cost"] = [run["tap"] + run["score + select"] for run in own]
        seconds["net of the layer left out"] = [
            ours["all"] - theirs for ours, theirs in zip(own, base, strict=True)
        ]
        rows = {name: _row(name, found, base) for name, found in seconds.items()}
        peaks = {name: peak_bytes(way, self.device) for name, way in ways.items()}
        least = peaks["stock tower"]
        for name, peak in peaks.items():
            rows[name] |= {"peak_bytes": peak, "peak_ratio": peak / least}
        return [row | {"warnings": warnings} for row in rows.values()]

    def stock_way(self, pixels: Tensor) -> dict[str, float]:
        """As stock LLaVA does: all layers, every hidden state kept, the penultimate one read."""
        return self._timed(lambda: self.stock(pixels, output_hidden_states=True).hidden_states[-2])

    def maps_way(self, pixels: Tensor) -> dict[str, float]:
        """All maps and all hidden states."""
        return self._timed(
            lambda: self.eager(pixels, output_attentions=True, output_hidden_states=True)
        )

    def own_way(self, pixels: Tensor) -> dict[str, float]:
        """Tapped, one layer shorter; then score and select. The tap's hooks are timed apart."""
        hooks = _HookTimes(self.stock, self.pruner.layers, self.cpu_time)
        with torch.inference_mode(), hooks:
            clock = Clock(self.device, self.cpu_time)
            hidden, tap = encode_tiles(self.stock, pixels, self.depth, self.pruner.layers)
            features = VisionFeatures(hidden[:, 1:], hidden[:, 0], tap.queries, tap.keys)
            begin = clock.mark()
            self.pruner.select(features)
            end = clock.mark()
            synchronize(clock.on_gpu)
            everything = clock.host_seconds()
        choose = clock.seconds(end) - clock.seconds(begin)
        return {"all": everything, "tap": hooks.seconds, "score + select": choose}

    def scratch(self, tiles: int) -> tuple[int, int]:
        """Peak bytes of scoring random queries and keys of `tiles` tiles, and their own bytes."""
        features = self._random_features(tiles)
        score = partial(importance.received_attention, features, self.pruner.layers)
        with torch.inference_mode():
            peak = peak_bytes(score, self.device)
        stored = [*features.queries.values(), *features.keys.values()]
        return peak, sum(tensor.nbytes for tensor in stored)

    def kernel(self, rounds: int) -> str:
        """On a GPU: the Triton kernel and the PyTorch form, against their least traffic."""
        dtype = next(self.stock.parameters()).dtype
        limits = ceilings(self.device, dtype)
        rows = [["tiles", "kernel, us per layer", "PyTorch form", "floor", "largest difference"]]
        for tiles in TILES:
            features = self._random_features(tiles)
            layer = self.pruner.layers[0]
            q, k = features.queries[layer], features.keys[layer]
            if not importance.kernel_runs_on(q.device):
                return "The Triton kernel does not run: Triton is missing, or the GPU is too old."
            kernel = partial(importance.column_means, q, k)
            plain = partial(importance.column_means_in_pytorch, q, k)
            with torch.inference_mode():
                ways = {
                    "kernel": partial(timed, kernel, self.device, calls=CALLS),
                    "plain": partial(timed, plain, self.device),
                }
                times = interleave(ways, rounds, warmup=2)
                apart = (kernel() - plain()).abs().max() / plain().max()
            cells = [f"{1e6 * Spread.of(seconds).median:.0f}" for seconds in times.values()]
            # Queries and keys once each, and twice the arithmetic: the logits are made two times.
            traffic = (q.nbytes + k.nbytes) / limits.bytes
            length, width = q.shape[2], q.shape[1] * q.shape[3]
            arithmetic = 2 * 2 * tiles * length**2 * width / limits.flops
            floor = f"{1e6 * traffic:.1f} traffic, {1e6 * arithmetic:.1f} arithmetic"
            rows.append([str(tiles), *cells, floor, f"{float(apart):.1e}"])
        return pipes(rows, left=0)

    def _random_features(self, tiles: int) -> VisionFeatures:
        config, dtype = self.stock.config, next(self.stock.parameters()).dtype
        length = 1 + (config.image_size // config.patch_size) ** 2

        def projected() -> Tensor:
            flat = torch.randn(tiles, length, config.hidden_size, device=self.device).to(dtype)
            return flat.unflatten(-1, (config.num_attention_heads, -1)).transpose(1, 2)

        tokens = torch.zeros(tiles, length - 1, 1, device=self.device)
        queries = {layer: projected() for layer in self.pruner.layers}
        keys = {layer: projected() for layer in self.pruner.layers}
        return VisionFeatures(tokens, tokens[:, 0], queries, keys)

    def _timed(self, run: Any) -> dict[str, float]:
        with torch.inference_mode():
            return {"all": timed(run, self.device, self.cpu_time)}


class _HookTimes:
    """Seconds spent in the tap's hooks.

    They run behind the hooks that were there before, and ahead of the projection that comes next:
    attention calls `q_proj`, `k_proj`, `v_proj` in this order.
    """

    def __init__(self, tower: nn.Module, layers: tuple[int, ...], cpu_time: bool) -> None:
        self._attention = [encoder_of(tower).layers[layer - 1].self_attn for layer in layers]
        self._now = time.process_time if cpu_time else time.perf_counter
        self._hooks = ExitStack()
        self.seconds = 0.0

    def __enter__(self) -> _HookTimes:
        for attention in self._attention:
            order = (attention.q_proj, attention.k_proj, attention.v_proj)
            for tapped, following in pairwise(order):
                self._add(following.register_forward_pre_hook(lambda *_: self._count(self._now())))
                self._add(tapped.register_forward_hook(lambda *_: self._count(-self._now())))
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.close()

    def _count(self, seconds: float) -> None:
        self.seconds += seconds

    def _add(self, handle: Any) -> None:
        self._hooks.callback(handle.remove)


def _row(name: str, seconds: list[float], base: list[float]) -> dict[str, Any]:
    own, ratio = Spread.of(seconds), ratios(seconds, base)
    return {
        "what": name,
        "ms": 1e3 * own.median,
        "ms_q1": 1e3 * own.low,
        "ms_q3": 1e3 * own.high,
        "ratio": ratio.median,
        "ratio_q1": ratio.low,
        "ratio_q3": ratio.high,
        "rounds": own.count,
    }
