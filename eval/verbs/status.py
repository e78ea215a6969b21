"""`python -m eval status`: how far an evaluation has come."""

from __future__ import annotations

from pathlib import Path

import typer

from eval.verbs.options import Config, Data, Limit, Model, Out, Rows, Tasks, says_errors


@says_errors
def status(
    config: Config,
    out: Out = Path("results"),
    model: Model = None,
    rows: Rows = None,
    tasks: Tasks = None,
    limit: Limit = None,
    data: Data = Path("data"),
) -> None:
    """Show what is done, stale or failed (and why), running and missing; what would stop a run."""
    from eval.plan.table import load_table, select_rows, select_tasks
    from eval.report.status import report
    from eval.results.shelf import Shelf
    from eval.run.preflight import problems

    table = load_table(config, model)
    shelf = Shelf(table, out, select_rows(table, rows), select_tasks(table, tasks), limit)
    stops: list[str] = []
    for part in shelf.by_checkpoint():
        left = [unit for unit in part.units if not part.state(unit).answered]
        stops += problems(part, left, data) if left else []
    typer.echo(report(shelf, list(dict.fromkeys(stops))))
