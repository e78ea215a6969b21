"""`python -m eval`: run, read and draw everything the library is measured by."""

import typer

from eval.claims import claims
from eval.doctor import doctor
from eval.efficiency import efficiency
from eval.explore import explore
from eval.figures import figures
from eval.methods import methods
from eval.prefetch import prefetch
from eval.run import run
from eval.status import status
from eval.table import table
from eval.tap import tap

app = typer.Typer(no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False)
app.command()(run)
app.command()(prefetch)
app.command()(doctor)
app.command()(table)
app.command()(claims)
app.command()(status)
app.command()(efficiency)
app.command()(figures)
app.command()(explore)
app.command()(methods)
app.command()(tap)

if __name__ == "__main__":
    app(prog_name="python -m eval")
