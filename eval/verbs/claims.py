"""`python -m eval claims`: the paper's claims beside its own cells and our results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eval import ROOT
from eval.verbs.options import Out, says_errors


@says_errors
def claims(
    out: Out = Path("results"),
    configs: Annotated[Path, typer.Option(help="Folder of table1..3.yaml.")] = ROOT / "configs",
    model: Annotated[str | None, typer.Option(help="Checkpoint of Tables 1 and 3.")] = None,
    next_model: Annotated[str | None, typer.Option(help="Checkpoint of Table 2.")] = None,
) -> None:
    """Print the paper's claims beside what its cells and our results say."""
    from eval.plan.table import load_table
    from eval.report.claims import measured_cells, printed_cells, report

    tables = {
        name: load_table(configs / f"{name}.yaml", next_model if name == "table2" else model)
        for name in ("table1", "table2", "table3")
    }
    ours = {name: measured_cells(table, out) for name, table in tables.items()}
    typer.echo(report({name: printed_cells(table) for name, table in tables.items()}, ours))
