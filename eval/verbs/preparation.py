"""`python -m eval preparation`: what preparing the pixels of an image takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eval.verbs.options import says_errors


@says_errors
def preparation(
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 40,
    out: Annotated[Path, typer.Option(help="Stem of the .csv and .md.")] = Path(
        "results/preparation"
    ),
) -> None:
    """Time LLaVA's own preprocessing, ours and its resizes alone; begun measurements go on."""
    import torch

    from eval.efficiency import preparation

    torch.set_num_threads(1)
    typer.echo(preparation.preparation(rounds, out))
