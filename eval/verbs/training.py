"""`python -m eval training`: what a step of training takes, by kept tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eval.verbs.options import Device, Dtype, Threads, WorkedTime, says_errors


@says_errors
def training(
    random_weights: Annotated[
        str, typer.Option(help="Shape of the model, such as llava-v1.5-7b.")
    ] = "llava-v1.5-7b",
    layers: Annotated[int | None, typer.Option(help="Of the language model; all of them.")] = None,
    trained: Annotated[str, typer.Option(help="projector, or all: all but the tower.")] = (
        "projector"
    ),
    rounds: Annotated[int, typer.Option(min=1, help="In turn, after a warm-up.")] = 5,
    device: Device = "",
    dtype: Dtype = "",
    threads: Threads = 0,
    cpu_time: WorkedTime = False,
    out: Annotated[Path, typer.Option(help="Stem of the .csv and .md.")] = Path("results/training"),
) -> None:
    """Time forward and backward pass under HIVTP against the unpruned model, random weights."""
    import torch

    from eval.efficiency.training import METHODS, Step, measure
    from eval.untrained.shapes import shape

    if threads:
        torch.set_num_threads(threads)
    asked = Step(shape(random_weights, layers), trained, rounds, device, dtype, cpu_time)
    typer.echo(measure(asked, METHODS, out))
