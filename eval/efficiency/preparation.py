"""What preparing the pixels of an image takes: LLaVA's own way, ours, and the resizes alone."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from llava.mm_utils import expand2square, process_images, select_best_resolution
from PIL import Image

from eval import machine
from eval.clock import Spread, interleave, ratios, timed
from eval.efficiency.inputs import random_picture
from eval.efficiency.report import show, write_csv
from eval.markdown import pipes
from eval.untrained.models import PINPOINTS, image_processor
from llava_hivtp.images import prepare_images

SIDE = 336
MODES = {"pad": "LLaVA-v1.5 (pad)", "anyres": "LLaVA-NeXT (anyres)", "crop": "middle (no pad)"}
SIZES = ((500, 375), (640, 480), (1024, 768))
_CPU = torch.device("cpu")


def preparation(rounds: int, out: Path) -> str:
    """Measure every mode and size that `out` lacks, write .csv and .md; returns the latter."""
    path = out.with_name(out.name + ".csv")
    here = machine.columns(_CPU) | {"clock": "process", "pillow": machine.version("pillow")}
    rows = _measured_before(path, here)
    done = {(row["mode"], row["image"]) for row in rows}
    for mode in MODES:
        for size in SIZES:
            image = "x".join(map(str, size))
            if (mode, image) not in done:
                rows.append({"mode": mode, "image": image} | _measure(mode, size, rounds) | here)
                write_csv(path, rows)
    heads = ["", "image", "LLaVA's own, ms", "here, ms", "resizes alone, ms", "here / resizes"]
    cells = [[MODES[row["mode"]], *(row[name] for name in _SHOWN)] for row in rows]
    text = "\n\n".join(
        [
            "Milliseconds per image in memory, medians with quartiles of "
            f"{rounds} interleaved rounds, own CPU time, one thread; equal bits.",
            "; ".join(f"{name} {value}" for name, value in here.items() if value),
            pipes([heads, *cells], left=2),
        ]
    )
    out.with_name(out.name + ".md").write_text(text + "\n")
    return text


_SHOWN = ("image", "llava_ms", "here_ms", "resizes_ms", "here_vs_resizes")


def _measured_before(path: Path, here: dict[str, str]) -> list[dict[str, Any]]:
    """Rows of a file, if they are of this machine and this code."""
    if not path.is_file():
        return []
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if all(row.get(name) == value for name, value in here.items())]


def _measure(mode: str, size: tuple[int, int], rounds: int) -> dict[str, str]:
    grid = [[w * SIDE, h * SIDE] for w, h in PINPOINTS]
    aspect = "square" if mode == "crop" else mode
    config = SimpleNamespace(image_aspect_ratio=aspect, image_grid_pinpoints=grid)
    processor, image = image_processor(SIDE), random_picture(size)
    theirs, ours = (
        process_images([image], processor, config),
        prepare_images([image], processor, config),
    )
    if not torch.equal(theirs, ours[0]):
        raise RuntimeError(f"{mode}, {size}: other pixels than LLaVA's")
    runs = {
        "llava_ms": partial(process_images, [image], processor, config),
        "here_ms": partial(prepare_images, [image], processor, config),
        "resizes_ms": _resizes(mode, image, grid, processor.image_mean),
    }
    timings = {name: partial(timed, run, _CPU, cpu_time=True) for name, run in runs.items()}
    seconds = interleave(timings, rounds, warmup=3)
    found = {name: show(Spread.of(values), 1e3, 2) for name, values in seconds.items()}
    ratio = ratios(seconds["here_ms"], seconds["resizes_ms"])
    return found | {"here_vs_resizes": show(ratio, 1, 2), "rounds": str(rounds)}


def _resizes(mode: str, image: Image.Image, grid: Any, mean: Any) -> Callable[[], Any]:
    """The resizes that LLaVA asks of Pillow, nothing else."""
    width, height = image.size
    if mode == "pad":
        square = expand2square(image, tuple(int(255 * m) for m in mean))
        return partial(square.resize, (SIDE, SIDE), Image.Resampling.BICUBIC)
    if mode == "anyres":
        w, h = select_best_resolution(image.size, grid)
        scale = min(w / width, h / height)
        sizes = [(SIDE, SIDE), (math.ceil(width * scale), math.ceil(height * scale))]
    else:
        scale = SIDE / min(width, height)
        sizes = [(int(width * scale), int(height * scale))]
    return lambda: [image.resize(size, Image.Resampling.BICUBIC) for size in sizes]
