"""`python -m eval table`: a table of the paper, from stored results."""

from __future__ import annotations

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
) -> None:
    """Print a table of the paper: ours, the paper's numbers, the difference."""
    from eval.plan.table import select_rows, with_results
    from eval.report.table import footer, render
    from eval.results.collect import collect

    found = [
        collect(shown, select_rows(shown, rows), out, limit, device, stale=stale)
        for shown in with_results(config, out, model)
    ]
    typer.echo(render(found, format.value))
    if format is Format.csv:
        typer.echo("\n".join(line for collected in found for line in footer(collected)), err=True)
