"""How long a request takes: batch 1, the device to itself, never from a journal."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from lmms_eval.api.instance import Instance

    from llava_hivtp.lmms import LlavaHIVTP

WARMUP = 5  # requests answered first and not counted
CLOCK = "prepared pixels and prompt to first token, and to the whole answer, on the host"


def time_requests(lm: LlavaHIVTP, instances: list[Instance]) -> dict[str, Any]:
    """Answer each request by itself; the mean TTFT and the tokens per second of them all."""
    for instance in instances[:WARMUP]:
        _time(lm, instance)
    samples = [_time(lm, instance) for instance in instances]
    ttft, total, generated = zip(*samples, strict=True)
    return {
        "requests": len(samples),
        "warmup": min(WARMUP, len(samples)),
        "ttft_ms": 1000 * sum(ttft) / len(samples),
        "throughput": sum(generated) / sum(total),
        "samples": samples,
    }


@contextmanager
def device_share(device: torch.device, alone: bool) -> Iterator[None]:
    """Keep others of our processes off a device while it is timed; wait for those that work."""
    path = Path(tempfile.gettempdir()) / f"llava_hivtp-{os.getuid()}-{_identity(device)}.lock"
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield
    finally:
        os.close(handle)


def _time(lm: LlavaHIVTP, instance: Instance) -> tuple[float, float, int]:
    """(seconds to the first token, seconds to the whole answer, generated tokens)."""
    (answer,) = lm.answer([lm.read(instance)], timed=True)
    return answer.ttft, answer.seconds, answer.generated


def _identity(device: torch.device) -> str:
    import torch

    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    return str(getattr(properties, "uuid", device.index))
