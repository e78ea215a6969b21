"""Fair timing: interleaved rounds, medians with quartiles, honest memory peaks."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any, TypeVar

from eval.efficiency.ideal import Ceilings

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
) -> dict[Key, list[Result]]:
    """Run all of them in turn, A B A B, `rounds` times after `warmup` rounds thrown away.

    After the moment `until` of time.monotonic no further round begins: one is always done.
    """
    results: dict[Key, list[Result]] = {key: [] for key in runs}
    for number in range(-warmup, rounds):
        if number > 0 and time.monotonic() > until:
            break
        for key, run in runs.items():
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


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Most bytes of tensors alive during one call, beyond those alive before it.

    On a GPU the caching allocator counts them, on a CPU PyTorch's profiler does: both see every
    tensor and none of the libraries' own workspace.
    """
    import torch

    if device.type == "cuda":
        synchronize()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def ceilings(
    device: torch.device, dtype: torch.dtype, cpu_time: bool = False, rounds: int = 5
) -> Ceilings:
    """Measure what the device reaches: a large matrix product, a large tensor read or copied."""
    import torch

    rows, width, large = (4096, 4096, 2**30) if device.type == "cuda" else (512, 2048, 2**28)
    a = torch.randn(rows, width, device=device).to(dtype)
    b = torch.randn(width, 2 * width, device=device).to(dtype)
    matrix = torch.ones(large // dtype.itemsize // width, width, device=device, dtype=dtype)
    other = torch.empty_like(matrix)
    vector = torch.ones(width, device=device, dtype=dtype)
    work = {
        "flops": lambda: a @ b,
        "read": lambda: matrix @ vector,
        "copy": lambda: other.copy_(matrix),
    }
    calls = 10 if device.type == "cuda" else 1  # a launch takes a part of such a call's time
    seconds = interleave(
        {name: partial(timed, run, device, cpu_time, calls) for name, run in work.items()},
        rounds,
        warmup=2,
    )
    return Ceilings(
        flops=4 * rows * width**2 / min(seconds["flops"]),
        bytes=max(matrix.nbytes / min(seconds["read"]), 2 * matrix.nbytes / min(seconds["copy"])),
    )


def plan_nothing() -> None:
    """Leave cuDNN's attention out: it plans anew for every length it meets.

    PyTorch prefers it on the newest GPUs. Asking one request again and again would hide what the
    first one at every new length pays.
    """
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)


def machine(device: torch.device) -> dict[str, str]:
    """What was measured on, and with which versions: columns of every results file."""
    import torch

    from llava_hivtp.importance import kernel_runs_on

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "device": name,
        "clocks": _clocks(device) if device.type == "cuda" else "",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "triton": _version("triton"),
        "score": "triton" if kernel_runs_on(device) else "pytorch",
        "cudnn_attention": "off" if device.type == "cuda" else "",
        "flash_attn": _version("flash-attn"),
        "commit": commit(),
    }


def commit() -> str:
    """The checkout's commit, `+` behind it where files differ from it; empty outside git."""
    root = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        return head + ("+" if head and git("status", "--porcelain", "-uno") else "")
    except FileNotFoundError:
        return ""


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def _clocks(device: torch.device) -> str:
    query = "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm,power.limit,driver_version"
    command = ["nvidia-smi", query, "--format=csv,noheader", "-i", str(device.index or 0)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip().replace(",", ";")
