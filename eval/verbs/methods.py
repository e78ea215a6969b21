"""`python -m eval methods`: what every method keeps and what choosing costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eval.verbs.options import Device, Dtype, Encoder, Rows, integers, says_errors

_TABLE = Path("configs/table1.yaml")


@says_errors
def methods(
    config: Annotated[Path, typer.Argument(help="The table whose rows to measure.")] = _TABLE,
    rows: Rows = None,
    tiles: Annotated[str, typer.Option(help="Tiles per image, 1 or 3 to 5 each.")] = "1,5",
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved rounds behind a median.")] = 5,
    encoder: Encoder = "llava-v1.5-7b",
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Print tokens kept and time of choosing them, as a share of the vision tower's time."""
    counts = integers("tiles", tiles)
    from eval.efficiency import device as devices
    from eval.efficiency import methods
    from eval.plan.table import load_table, select_rows
    from eval.untrained.shapes import shape

    if not set(counts) <= set(methods.TILE_GRIDS):
        raise typer.BadParameter(f"--tiles must be of {list(methods.TILE_GRIDS)}, got {tiles!r}")
    chosen, place = select_rows(load_table(config), rows), devices.chosen(device, dtype)
    typer.echo(methods.compare(chosen, shape(encoder), counts, repeats, *place))
