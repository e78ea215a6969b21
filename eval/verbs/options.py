"""What the verbs share: their options, and one way from an error to an exit status."""

from __future__ import annotations

import functools
import re
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
Device = Annotated[str, typer.Option(help="cuda or cpu; a GPU if there is one.")]
Dtype = Annotated[str, typer.Option(help="float16 on a GPU, float32 on a CPU.")]
Encoder = Annotated[str, typer.Option(help="Tower of this shape: a name of --random-weights.")]
Threads = Annotated[int, typer.Option(help="CPU threads; 0: as torch chooses.")]
WorkedTime = Annotated[
    bool, typer.Option(help="On a CPU others use too: count own CPU time; with --threads 1.")
]

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


def words(option: str, spelled: str) -> tuple[str, ...]:
    """Words by comma."""
    found = tuple(word for word in re.split(r"[\s,]+", spelled) if word)
    if not found:
        raise typer.BadParameter(f"--{option} is empty")
    return found


def integers(option: str, spelled: str) -> tuple[int, ...]:
    """Whole numbers by comma, in order, each once."""
    found = words(option, spelled)
    if not all(word.isdecimal() and int(word) for word in found):
        raise typer.BadParameter(f"--{option} {spelled}: whole numbers from 1, by comma")
    return tuple(sorted({int(word) for word in found}))


def size(spelled: str) -> tuple[int, int]:
    """`640x480` as (width, height)."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", spelled)
    if not found:
        raise typer.BadParameter(f"--size {spelled}: write WIDTHxHEIGHT, such as 640x480")
    return int(found[1]), int(found[2])
