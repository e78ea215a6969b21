"""`python -m eval prefetch`: fetch what a run reads, where there is a network."""

from __future__ import annotations

import logging
from pathlib import Path

import typer

from eval.verbs.options import Config, Data, Model, Tasks, says_errors


@says_errors
def prefetch(
    config: Config, model: Model = None, tasks: Tasks = None, data: Data = Path("data")
) -> None:
    """Download the checkpoint, its vision tower and the data sets, unless they are here."""
    from eval.benchmarks.fetch import fetch
    from eval.plan.table import load_table, select_tasks

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("eval").setLevel(logging.INFO)
    table = load_table(config, model)
    names = select_tasks(table, tasks)
    fetch(table.model, names, data)
    typer.echo(f"{table.model} and {len(names)} data sets are here")
