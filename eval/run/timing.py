"""How long a request takes: batch 1, the device to itself, never from a journal."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from eval.clock import Watch

if TYPE_CHECKING:
    import torch
    from lmms_eval.api.instance import Instance

    from eval.run.progress import Progress
    from llava_hivtp.answer import Answer, Request
    from llava_hivtp.lmms import LlavaHIVTP
    from llava_hivtp.pruners import Pruner

Key = TypeVar("Key", bound=Hashable)

WARMUP = 5  # requests answered first and not counted
CLOCK = "prepared pixels and prompt to first token, and to the whole answer, on the host"


class RowFailed(Exception):
    """A row raised an error while it was timed, which is the cause; `key` names the row."""

    def __init__(self, key: object) -> None:
        super().__init__(f"{key} failed while it was timed")
        self.key = key


def time_rows(
    lm: LlavaHIVTP,
    pruners: Mapping[Key, Pruner],
    instances: Sequence[Instance],
    bar: Progress | None = None,
) -> dict[Key, dict[str, Any]]:
    """Answer each request by itself, under every pruner in turn; fields of `Timing` by pruner.

    What disturbs the machine meanwhile disturbs all of them, and none is always the first.

    Raises:
        RowFailed: if an answer fails.
    """
    watch = Watch(lm.device)
    found: dict[Key, list[Answer]] = {key: [] for key in pruners}
    order = [*range(len(instances))]
    for number, i in enumerate([*order[:WARMUP], *order], -len(order[:WARMUP])):
        request = lm.ready(i, instances)
        first = number % len(pruners)
        for key in [*pruners][first:] + [*pruners][:first]:
            with watch if number >= 0 else nullcontext():
                answer = _answer(lm, request, key, pruners[key])
            if number >= 0:
                found[key].append(answer)
        if bar is not None and number >= 0:
            bar.update(len(pruners))
    warnings = watch.warnings()
    return {key: _fields(answers, watch, warnings) for key, answers in found.items()}


def _answer(lm: LlavaHIVTP, request: Request, key: Key, pruner: Pruner) -> Answer:
    lm.model.pruner = pruner
    try:
        (answer,) = lm.answer([request], timed=True)
    except Exception as error:
        raise RowFailed(key) from error
    return answer


def _fields(answers: Sequence[Answer], watch: Watch, warnings: list[str]) -> dict[str, Any]:
    """The mean TTFT and the tokens per second over all requests of a row."""
    count = len(answers)
    return {
        "requests": count,
        "warmup": min(WARMUP, count),
        "ttft_ms": 1000 * sum(each.ttft for each in answers) / count,
        "throughput": sum(each.generated for each in answers) / sum(e.seconds for e in answers),
        "samples": [[each.ttft, each.seconds, each.generated] for each in answers],
        "preparation_ms": 1000 * sum(each.preparation for each in answers) / count,
        "worked_share": watch.share,
        "warnings": warnings,
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


def _identity(device: torch.device) -> str:
    import torch

    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    return str(getattr(properties, "uuid", device.index))
