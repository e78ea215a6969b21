"""What a device reaches, and what a call takes of its memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from eval.clock import interleave, synchronize, timed
from eval.efficiency.ideal import Ceilings


def chosen(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Device and dtype as a command line names them; by default a GPU, and half precision on it."""
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    name = dtype or ("float16" if place.type == "cuda" else "float32")
    kind = getattr(torch, name, None)
    if not isinstance(kind, torch.dtype):
        raise ValueError(f"unknown dtype {name!r}; choose float32, float16 or bfloat16")
    return place, kind


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Most bytes of tensors alive during one call, beyond those alive before it.

    On a GPU the caching allocator counts them, on a CPU PyTorch's profiler does: both see every
    tensor and none of the libraries' own workspace.
    """
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


def leave_out_cudnn_attention() -> None:
    """It plans anew for every length it meets.

    PyTorch prefers it on the newest GPUs. Asking one request again and again would hide what the
    first one at every new length pays.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
