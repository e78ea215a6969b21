"""A step of training against the number of kept tokens, beside the ideal ratio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval import machine
from eval.clock import Spread, Watch, interleave, ratios, timed
from eval.efficiency.device import chosen, leave_out_cudnn_attention, peak_bytes
from eval.efficiency.ideal import RequestSizes, stages
from eval.efficiency.report import write_csv
from eval.markdown import pipes
from eval.untrained.models import random_model
from eval.untrained.shapes import Shape, shape_of
from llava_hivtp.pruners import read_pruner

TEXT = 64  # tokens around the image
LEARNT = 16  # of these, at the end
# `fill` keeps the same number of every image.
METHODS = ("none",) + tuple(
    f"hivtp:r=2,{setting},fill=true" for setting in ("k=50,c=2", "k=25,c=2", "k=14,c=3", "k=5,c=4")
)


@dataclass(frozen=True)
class Step:
    """What is trained of a random model, and how it is measured."""

    shape: Shape
    trained: str = "projector"  # or all: the language model, too
    rounds: int = 5
    device: str = ""
    dtype: str = ""
    cpu_time: bool = False


def measure(asked: Step, methods: Sequence[str], out: Path) -> str:
    """Time forward and backward pass of every method in turn, and their memory.

    Writes the .csv and .md beside the stem `out`; returns the latter.

    Raises:
        ValueError: if `trained` is neither projector nor all.
    """
    if asked.trained not in ("projector", "all"):
        raise ValueError(f"trained must be projector or all, got {asked.trained!r}")
    leave_out_cudnn_attention()
    place, kind = chosen(asked.device, asked.dtype)
    model, _ = random_model(asked.shape, str(place), kind)
    body = model.get_model()
    (body.mm_projector if asked.trained == "projector" else model).requires_grad_(True)
    body.get_vision_tower().requires_grad_(False)
    runs = {name: partial(_step, model, read_pruner(name), _batch(model)) for name in methods}
    watch = Watch(place)
    clocked = {name: partial(timed, run, place, asked.cpu_time) for name, run in runs.items()}
    seconds = interleave(clocked, asked.rounds, watch=watch)
    kept = {name: _kept(run, model) for name, run in runs.items()}
    peaks = {name: peak_bytes(run, place) for name, run in runs.items()}
    rows = _rows(asked.trained, shape_of(model), kept, seconds, peaks)
    found = machine.columns(place) | {"dtype": str(kind).removeprefix("torch.")}
    found["clock"] = "process" if asked.cpu_time and place.type == "cpu" else "wall"
    warnings = [] if found["clock"] == "process" else watch.warnings()
    write_csv(out.with_name(out.name + ".csv"), [row | found for row in rows])
    text = "\n\n".join([*_head(asked, found, watch.share), *warnings, _table(rows)]) + "\n"
    out.with_name(out.name + ".md").write_text(text)
    return text


def _batch(model: Any) -> dict[str, Tensor]:
    """One image and a text of which the end is learnt; equal for every method."""
    from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX

    generator = torch.Generator().manual_seed(0)
    side, place = model.get_vision_tower().config.image_size, model.device
    ids = torch.randint(3, model.config.vocab_size, (1, TEXT + 1), generator=generator)
    ids[0, 1] = IMAGE_TOKEN_INDEX
    labels = ids.masked_fill(torch.arange(TEXT + 1) <= TEXT - LEARNT, IGNORE_INDEX)
    pixels = torch.randn(1, 3, side, side, generator=generator).to(place, model.dtype)
    return {"input_ids": ids.to(place), "labels": labels.to(place), "images": pixels}


def _step(model: Any, pruner: Any, batch: dict[str, Tensor]) -> None:
    """Forward and backward pass; the gradients go."""
    model.pruner = pruner
    model(**batch, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)


def _kept(run: Any, model: Any) -> int:
    run()
    (image,) = model.kept
    return image.patches


def _rows(
    trained: str,
    shape: Shape,
    kept: dict[str, int],
    seconds: dict[str, list[float]],
    peaks: dict[str, int],
) -> list[dict[str, Any]]:
    """A row for each method; ratios to the first one, paired round by round."""
    first = next(iter(kept))
    flops = {name: _flops(trained, shape, count) for name, count in kept.items()}
    rows = []
    for name, count in kept.items():
        ratio = ratios(seconds[name], seconds[first])
        rows.append(
            {
                "trained": trained,
                "method": name,
                "kept": count,
                "seconds": Spread.of(seconds[name]).median,
                "ratio": ratio.median,
                "ratio_q1": ratio.low,
                "ratio_q3": ratio.high,
                "ideal_ratio": flops[name] / flops[first],
                "peak_bytes": peaks[name],
                "peak_ratio": peaks[name] / peaks[first],
                "positions_ratio": (count + TEXT) / (kept[first] + TEXT),
                "rounds": len(seconds[name]),
            }
        )
    return rows


def _flops(trained: str, shape: Shape, kept: int) -> float:
    """Arithmetic of a step, choosing tokens left out.

    The tower runs forward only. Behind it a matrix product with a weight costs as much again for
    the gradient of its input, and again for that of its weight where it is trained; one of
    attention, which has no weight, twice as much.
    """
    length = kept + TEXT
    depth = shape.tower.layers - 1
    work = stages(shape, RequestSizes(1, 1, depth, kept, length), itemsize=4)
    attention = shape.layers * 4 * length**2 * shape.width
    products = work.prefill.flops - attention
    behind = 3 if trained == "all" else 2
    # The projector's first layer needs no gradient of its input.
    first = 2 * shape.tower.width * shape.width * kept
    return work.tower.flops + 3 * work.project.flops - first + behind * products + 3 * attention


def _head(asked: Step, found: dict[str, str], share: float) -> list[str]:
    own = asked.shape
    what = "the projector alone" if asked.trained == "projector" else "projector and language model"
    return [
        "; ".join(f"{name} {value}" for name, value in found.items() if value),
        f"Random weights, width {own.width}, language-model layers: {own.layers}; {TEXT} text "
        f"tokens, one image, trained: {what}. Forward and backward pass, without the optimizer. "
        f"The timed calls worked {share:.0%} of the time that passed.",
    ]


def _table(rows: Sequence[dict[str, Any]]) -> str:
    head = ["method", "kept", "s", "/ unpruned", "ideal", "peak MB", "/ unpruned", "positions"]
    cells = [
        [
            row["method"],
            str(row["kept"]),
            f"{row['seconds']:.2f}",
            f"{row['ratio']:.3f} ({row['ratio_q1']:.3f}-{row['ratio_q3']:.3f})",
            f"{row['ideal_ratio']:.3f}",
            f"{row['peak_bytes'] / 1e6:.0f}",
            f"{row['peak_ratio']:.3f}",
            f"{row['positions_ratio']:.3f}",
        ]
        for row in rows
    ]
    return pipes([head, *cells], left=1)
