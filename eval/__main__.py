"""`python -m eval`: run, read and draw everything the library is measured by."""

import typer

app = typer.Typer(no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False)

if __name__ == "__main__":
    app(prog_name="python -m eval")
