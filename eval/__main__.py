"""`python -m eval`: run, read and draw everything the library is measured by."""

import typer

from eval.verbs.calibrate import calibrate
from eval.verbs.claims import claims
from eval.verbs.doctor import doctor
from eval.verbs.efficiency import efficiency
from eval.verbs.explore import explore
from eval.verbs.figures import figures
from eval.verbs.methods import methods
from eval.verbs.prefetch import prefetch
from eval.verbs.preparation import preparation
from eval.verbs.run import run
from eval.verbs.status import status
from eval.verbs.table import table
from eval.verbs.tap import tap
from eval.verbs.training import training

app = typer.Typer(no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False)
for verb in (
    *(run, prefetch, doctor, table, claims, status, calibrate),
    *(efficiency, preparation, tap, training, methods, figures, explore),
):
    app.command()(verb)

if __name__ == "__main__":
    app(prog_name="python -m eval")
