"""A model spread over processes by DeepSpeed ZeRO-3: 13B and larger on small GPUs.

Spread are the layers of the language model, nearly all of its weights: every process holds its
share of each and gathers a layer while it runs. Vision tower, projector and embeddings stay whole.
So processes may ask about different images, but all must generate equally often: one that does
not leaves the others waiting.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
from torch import distributed

T = TypeVar("T")
PATIENCE = timedelta(days=30)  # a launcher ends those who wait for a process that died


@dataclass(frozen=True)
class Team:
    """This process among those that hold one model together; by default it is alone."""

    index: int = 0
    count: int = 1

    def exchange(self, mine: T) -> list[T]:
        """What each process says, in their order; all must call this equally often, too."""
        if self.count == 1:
            return [mine]
        said: list[Any] = [None] * self.count
        distributed.all_gather_object(said, mine)
        return said


def join() -> Team:
    """Meet the other processes that torchrun or accelerate started.

    Raises:
        ImportError: if DeepSpeed is absent.
        ValueError: if no launcher started this process.
    """
    deepspeed = imported()
    if not distributed.is_initialized() and "RANK" not in os.environ:
        raise ValueError(
            "zero3 spreads a model over processes: start them with "
            "`torchrun --nproc_per_node N`, one per GPU"
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    with nothing_compiled():
        deepspeed.init_distributed(timeout=PATIENCE, verbose=False)
    return Team(distributed.get_rank(), distributed.get_world_size())


def imported() -> Any:
    """DeepSpeed; an ImportError says how to install it."""
    try:
        import deepspeed
    except ImportError as error:
        raise ImportError(
            f"ZeRO needs DeepSpeed: DS_BUILD_OPS=0 pip install 'llava_hivtp[deepspeed]' ({error})"
        ) from error
    return deepspeed


def spread(model: Any) -> None:
    """Give every process of the team its share of a model that all have loaded on the CPU.

    `model.generate` then goes on in every process until the last one has its answer.
    """
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "fp16": {"enabled": model.dtype == torch.float16},
        "bf16": {"enabled": model.dtype == torch.bfloat16},
    }
    with _layers_alone(model):
        # Before `initialize`, which would move the whole model to the GPU first.
        deepspeed.zero.Init(module=model, config_dict_or_path=config)
        engine, *_ = deepspeed.initialize(model=model, config=config)
    model.to(f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu")
    model.__dict__["_zero3"] = engine  # its hooks live as long as it does; no submodule
    model.generate = partial(model.generate, synced_gpus=True)


@contextmanager
def nothing_compiled() -> Iterator[None]:
    """Leave out DeepSpeed's own collective for CPUs.

    Compiling it takes minutes, under a lock that a killed process leaves behind for good.
    """
    imported()
    comm = sys.modules["deepspeed.comm.torch"]
    build, comm.build_shm_op = comm.build_shm_op, lambda: None
    try:
        yield
    finally:
        comm.build_shm_op = build


@contextmanager
def _layers_alone(model: Any) -> Iterator[None]:
    """Hide from DeepSpeed all of a LLaVA but the layers of its language model.

    Around the layers processes differ in what they call how often: the embeddings once a prompt,
    tower and projector once an image.
    """
    body = model.get_model()
    newline = body._parameters.pop("image_newline", None)
    if newline is not None:  # no module of its own to hide: whole as a buffer
        body.register_buffer("image_newline", newline.data)
    hidden = {owner: dict(owner._modules) for owner in (model, body)}
    model._modules = {"model": body}
    body._modules = {"layers": body.layers}
    try:
        yield
    finally:
        for owner, modules in hidden.items():
            owner._modules = modules
