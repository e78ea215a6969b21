"""Find the `reach` of a row at which images have so many tokens on average."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eval.plan.table import load_table, one_row, select_tasks
from eval.run.quiet import prepare_process
from eval.verbs.options import Config, Data, Model, Out, says_errors


@says_errors
def calibrate(
    config: Config,
    row: Annotated[str, typer.Option(help="Its `keep` caps the tokens of every tile.")],
    tokens: Annotated[float, typer.Option(min=1, help="Of an image, on average.")],
    task: Annotated[
        str | None, typer.Option(help="Whose questions are drawn; the table's first by default.")
    ] = None,
    sample: Annotated[int, typer.Option(min=1, help="Questions to draw.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    model: Model = None,
    out: Out = Path("results"),
    data: Data = Path("data"),
    write: Annotated[
        bool, typer.Option("--write", help="Add the row to the end of the table's file.")
    ] = False,
) -> None:
    """Let images have as many tokens as they hold things, a given number on average.

    The language model stays idle. Prints a row of a table that `run` takes as it is; how it was
    found stands in it. The same command goes on after a stop.
    """
    prepare_process()
    table = load_table(config, model)
    tasks = select_tasks(table, task)[:1]
    from eval.plan.writer import add_row, as_line
    from eval.run.reach import Draw, calibrate_row

    draw = Draw(tasks[0], sample, seed)
    chosen, places = one_row(table, row), (out.resolve(), data.resolve())
    entry = calibrate_row(table, chosen, draw, tokens, *places)
    if not write:
        typer.echo(as_line(entry))
        return
    added = "added" if add_row(config, entry) else "is there already"
    typer.echo(f"{config}: row {entry['id']} {added}")
