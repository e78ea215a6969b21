"""`python -m eval.nano`: draw the data, train the model, run the demo."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)


@app.callback()
def _main() -> None:
    """The embedded model and its drawn world."""


@app.command()
def data(
    out: Annotated[Path, typer.Option(help="folder to run lmms-eval from")],
    size: Annotated[str, typer.Option(help="quick: 40 questions per set; full: 400")] = "quick",
    images: Annotated[str, typer.Option(help="small: 144 pixels; large: up to 288")] = "small",
    blank: Annotated[bool, typer.Option(help="hide every picture, keep every question")] = False,
) -> None:
    """Draw the eight data sets."""
    from eval.nano.datasets import write

    typer.echo(f"wrote {write(out, size, images, blank)}")


if __name__ == "__main__":
    app()
