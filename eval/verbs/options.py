"""What the verbs share: their options, and one way from an error to an exit status."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

Config = Annotated[Path, typer.Argument(help="YAML of the table, such as configs/table1.yaml.")]
Model = Annotated[
    str | None, typer.Option(help="Folder or hub id of the checkpoint; the YAML's by default.")
]
Rows = Annotated[
    str | None, typer.Option(help="Ids, patterns, numbers or sets: 'paper', 'hivtp-*', '1 5'.")
]
Tasks = Annotated[str | None, typer.Option(help="Tasks or columns: 'mme pope'.")]
Limit = Annotated[
    int | None, typer.Option(min=1, help="A dry run over the first N documents per task.")
]
Out = Annotated[Path, typer.Option(help="Folder of the results.")]
Data = Annotated[Path, typer.Option(help="Folder of the data sets.")]

ERRORS = (OSError, ImportError, LookupError, TypeError, ValueError)


def says_errors(verb: Callable[..., Any]) -> Callable[..., Any]:
    """Let what the user can mend end a verb with one line and exit status 1, not a traceback."""

    @functools.wraps(verb)
    def guarded(*args: Any, **options: Any) -> Any:
        try:
            return verb(*args, **options)
        except ERRORS as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from error

    return guarded
