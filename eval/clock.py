"""Fair times: interleaved rounds, medians with quartiles, and whether the device was ours alone."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any, TypeVar

from eval.machine import nvidia_smi

if TYPE_CHECKING:
    import torch

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements."""

    median: float
    low: float  # first quartile
    high: float  # third quartile
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of at least one value; quartiles by linear interpolation."""
        values = sorted(values)
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        low, _, high = quantiles(values, n=4, method="inclusive")
        return cls(median(values), low, high, len(values))

    def apart(self, other: Spread) -> bool:
        """Whether the quartiles do not overlap: only then is a difference called."""
        return self.high < other.low or other.high < self.low


def ratios(values: Iterable[float], base: Iterable[float]) -> Spread:
    """Of measurements paired round by round: slow drifts of the machine cancel."""
    return Spread.of(a / b for a, b in zip(values, base, strict=True))


def interleave(
    runs: Mapping[Key, Callable[[], Result]],
    rounds: int,
    warmup: int = 1,
    until: float = math.inf,
    watch: Watch | None = None,
) -> dict[Key, list[Result]]:
    """Run all of them in turn, A B A B, `rounds` times after `warmup` rounds thrown away.

    After the moment `until` of time.monotonic no further round begins: one is always done. `watch`
    looks on while what counts is run.
    """
    results: dict[Key, list[Result]] = {key: [] for key in runs}
    for number in range(-warmup, rounds):
        if number > 0 and time.monotonic() > until:
            break
        for key, run in runs.items():
            with watch if watch and number >= 0 else nullcontext():
                result = run()
            if number >= 0:
                results[key].append(result)
    return results


class Clock:
    """Moments on the device's own time line; reading them waits, taking them does not.

    With `cpu_time` a CPU's moments count what this process worked, not what the machine gave to
    others meanwhile: the way to measure where others work too, with one thread.
    """

    def __init__(self, device: torch.device, cpu_time: bool = False) -> None:
        self.on_gpu = device.type == "cuda"
        self._now = time.process_time if cpu_time and not self.on_gpu else time.perf_counter
        self.start()

    def start(self) -> None:
        """Wait for the device, then begin at zero."""
        synchronize(self.on_gpu)
        self._zero = self._now()
        self._first = self._moment()

    def mark(self) -> Any:
        """A moment, to be read with `seconds`."""
        return self._moment()

    def seconds(self, moment: Any) -> float:
        """From start to a moment, on the device."""
        if not self.on_gpu:
            return moment - self._first
        moment.synchronize()
        return self._first.elapsed_time(moment) / 1e3

    def host_seconds(self) -> float:
        """From start to now, as the caller sees it."""
        return self._now() - self._zero

    def _moment(self) -> Any:
        if not self.on_gpu:
            return self._now()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def synchronize(on_gpu: bool = True) -> None:
    """Wait until a GPU has finished what it was given."""
    import torch

    if on_gpu and torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(
    run: Callable[[], Any], device: torch.device, cpu_time: bool = False, calls: int = 1
) -> float:
    """Seconds one call takes, the device's work included; of several behind one another."""
    clock = Clock(device, cpu_time)
    for _ in range(calls):
        run()
    synchronize(clock.on_gpu)
    return clock.host_seconds() / calls


class Watch:
    """Notices whether the device was ours alone: use it as a context around each timed call.

    On a CPU the calling thread is always at work in such a call, so the time it did not work is
    the time that others did. On a GPU the driver's tool is asked.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.wall = self.worked = 0.0  # seconds of all calls: passed, and worked by this thread
        self._said: set[str] = set()
        self._ask_driver()

    def __enter__(self) -> Watch:
        self._began = time.perf_counter(), time.thread_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall += time.perf_counter() - self._began[0]
        self.worked += time.thread_time() - self._began[1]

    @property
    def share(self) -> float:
        """Worked over passed seconds: 1 where nobody else wanted the CPU."""
        return self.worked / self.wall if self.wall else 1.0

    def warnings(self) -> list[str]:
        """What makes the times doubtful, if anything."""
        self._ask_driver()
        return contended(self.share, self.device.type) + sorted(self._said)

    def _ask_driver(self) -> None:
        if self.device.type != "cuda":
            return
        processes = nvidia_smi(self.device, "compute-apps=pid").split()
        ours = str(os.getpid())
        # In a container our own process has another number there: then one of them is ours.
        others = len(processes) - (ours in processes or len(processes) > 0)
        if others > 0:
            self._said.add("other processes were on this GPU")
        slowed = nvidia_smi(self.device, _SLOWED)
        if "Active" in slowed.replace("Not Active", ""):
            self._said.add("the GPU lowered its clocks: heat or power")


_SLOWED = "gpu=clocks_throttle_reasons.hw_slowdown,clocks_throttle_reasons.sw_thermal_slowdown"
ALONE = 0.95  # of the passed seconds, worked: less means that others took the CPU


def contended(share: float, device: str) -> list[str]:
    """A warning if a CPU gave a timed thread too small a share of the seconds."""
    if device == "cuda" or share >= ALONE:
        return []
    return [f"others used this CPU: timed calls worked {share:.0%} of their time"]
