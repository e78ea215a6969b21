"""`python -m eval tap`: what choosing tokens costs beside the vision tower it reads from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eval.verbs.options import Device, Dtype, Encoder, Threads, WorkedTime, integers, says_errors


@says_errors
def tap(
    tiles: Annotated[str, typer.Option(help="Tiles per image, by comma.")] = "1,5",
    rounds: Annotated[int, typer.Option(help="Interleaved rounds after a warm-up.")] = 20,
    device: Device = "",
    dtype: Dtype = "",
    encoder: Encoder = "llava-v1.5-7b",
    threads: Threads = 0,
    cpu_time: WorkedTime = False,
    out: Annotated[Path, typer.Option(help="Stem of the .csv and .md.")] = Path("results/tap"),
) -> None:
    """Time tap, score and selection of HIVTP against a random tower: no weights needed.

    Three ways in turn: the tower as stock LLaVA calls it; as this library calls it, tapped and one
    layer shorter, with score and selection behind it; and the stock tower asked for its attention
    maps, which is what other implementations do. Then the memory that scoring needs.
    """
    counts = integers("tiles", tiles)
    import torch

    from eval.efficiency import tap

    if threads:
        torch.set_num_threads(threads)
    typer.echo(tap.tap(encoder, counts, rounds, device, dtype, cpu_time, out))
