"""`python -m eval table`: a table of the paper, from stored results."""

from __future__ import annotations

import shutil
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from eval.verbs.options import Config, Limit, Model, Out, Rows, says_errors


class Format(str, Enum):
    """How a table is written."""

    md = "md"
    csv = "csv"
    latex = "latex"


@says_errors
def table(
    config: Config,
    out: Out = Path("results"),
    format: Annotated[Format, typer.Option(help="Markdown, CSV or LaTeX.")] = Format.md,
    model: Model = None,
    rows: Rows = None,
    limit: Limit = None,
    device: Annotated[
        str | None, typer.Option(help="Show times of this device, where several were used.")
    ] = None,
    stale: Annotated[
        bool, typer.Option("--stale", help="Show results of another checkpoint or other code, too.")
    ] = False,
    against: Annotated[
        str | None, typer.Option(help="Row that all others are paired with; the unpruned one.")
    ] = None,
    protocol: Annotated[
        bool, typer.Option("--protocol", help="List the whole protocol and provenance.")
    ] = False,
    width: Annotated[
        int | None,
        typer.Option(min=0, help="Fold wider tables; 0: never. The terminal's own, if it is one."),
    ] = None,
) -> None:
    """Print a table of the paper: ours, the paper's numbers, the difference."""
    from eval.plan.table import one_row, select_rows, with_results
    from eval.report.table import footer, render
    from eval.results.collect import collect

    found = [
        collect(
            shown,
            select_rows(shown, rows),
            out,
            limit,
            device,
            stale=stale,
            against=one_row(shown, against) if against else None,
        )
        for shown in with_results(config, out, model)
    ]
    if width is None:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    typer.echo(render(found, format.value, protocol, width))
    if format is Format.csv:
        said = [line for collected in found for line in footer(collected, protocol)]
        typer.echo("\n".join(said), err=True)
