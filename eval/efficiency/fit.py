"""The largest batch that fits into the memory that is left beside the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from eval.efficiency.ideal import RequestSizes, request_bytes
from eval.untrained.shapes import Shape, shape_of

TILES = 5  # of LLaVA-NeXT's largest grid, the whole image among them
TEXT, GENERATED = 512, 128  # tokens: longer questions and answers are rare in the benchmarks
SHARE = 0.8  # of what is free: the allocator wastes some
MOST = 64  # beyond it no stage is faster


def fitting_batch(model: Any) -> int:
    """A power of two, the same for every method: that of unpruned requests.

    Raises:
        ValueError: if the closed forms do not know the model.
    """
    if model.chat is not None:
        raise ValueError("--batch auto knows official checkpoints only: give a number")
    room = SHARE * free_bytes(model.device)
    needed = request_bytes(*largest_request(shape_of(model)), model.dtype.itemsize, GENERATED)
    batch = 1
    while 2 * batch <= MOST and 2 * batch * needed <= room:
        batch *= 2
    return batch


def largest_request(shape: Shape) -> tuple[Shape, RequestSizes]:
    """A request of which nothing is pruned."""
    tower, tiles = shape.tower, TILES if shape.anyres else 1
    newlines = 2 * (tower.side // tower.patch) if shape.anyres else 0
    tokens = tiles * tower.patches + newlines
    return shape, RequestSizes(1, tiles, tower.layers - 1, tokens, tokens + TEXT)


def free_bytes(device: torch.device) -> int:
    """Memory that a process may still take."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if "MemAvailable" in line)
