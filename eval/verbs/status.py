"""`python -m eval status`: how far an evaluation has come."""

from __future__ import annotations

from pathlib import Path

import typer

from eval.verbs.options import Config, Limit, Model, Out, Rows, Tasks, says_errors


@says_errors
def status(
    config: Config,
    out: Out = Path("results"),
    model: Model = None,
    rows: Rows = None,
    tasks: Tasks = None,
    limit: Limit = None,
) -> None:
    """Show what is done, stale or failed (and why), running and missing."""
    from eval.plan.table import load_table, select_rows, select_tasks
    from eval.report.status import report

    table = load_table(config, model)
    typer.echo(report(table, select_rows(table, rows), select_tasks(table, tasks), out, limit))
