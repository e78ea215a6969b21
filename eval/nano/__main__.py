"""`python -m eval.nano`: draw the data, train and tune the model, run the demo."""

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
    size: Annotated[
        str, typer.Option(help="quick: 40 questions per set; sample: 160; full: 400")
    ] = "quick",
    images: Annotated[str, typer.Option(help="small: 144 pixels; large: up to 288")] = "small",
    blank: Annotated[bool, typer.Option(help="hide every picture, keep every question")] = False,
) -> None:
    """Draw a stand-in for every data set."""
    from eval.nano.datasets import write

    typer.echo(f"wrote {write(out, size, images, blank, further=True)}")


@app.command()
def train(
    variant: Annotated[
        str, typer.Option(help="v15 (flat), anyres (goes on from v15) or nodrop (sees all patches)")
    ] = "v15",
    out: Annotated[Path, typer.Option(help="states, logs, checkpoints")] = Path(
        "results/nano/train"
    ),
    threads: Annotated[
        int, typer.Option(min=1, help="of this process; as shipped 2 for the tower, then 1")
    ] = 1,
) -> None:
    """Train a checkpoint from nothing; the same command goes on after a stop."""
    import torch

    from eval.nano.checkpoint import digest
    from eval.nano.curves import draw_curves
    from eval.nano.train import logs
    from eval.nano.train import train as train_variant

    torch.set_num_threads(threads)
    checkpoint = train_variant(out, variant)
    picture = draw_curves(logs(out, variant), out / variant / "curves.png")
    typer.echo(f"{picture}\n{checkpoint}\nsha256 {digest(checkpoint)}")


@app.command()
def towers(
    name: Annotated[
        str, typer.Option(help="unguided, guided or contrastive; all by default")
    ] = "all",
    out: Annotated[Path, typer.Option(help="states, logs, checkpoints")] = Path(
        "results/nano/family"
    ),
) -> None:
    """Train small models with towers of their own; the same command goes on after a stop."""
    import torch

    from eval.nano.family import FAMILY, train_member

    torch.set_num_threads(1)
    for each in FAMILY if name == "all" else (name,):
        typer.echo(train_member(out, each))


@app.command()
def frontier(
    out: Annotated[Path, typer.Option(help="answers; the report is frontier.md")] = Path(
        "results/nano/frontier"
    ),
    number: Annotated[int, typer.Option(min=4, help="questions of each set")] = 80,
    towers: Annotated[
        str, typer.Option(help="checkpoints of the family")
    ] = "nodrop,unguided,guided",
) -> None:
    """Compare the methods on every tower of the family; goes on after a stop."""
    import torch

    from eval.nano.frontier_report import examine, report

    torch.set_num_threads(1)
    file = out / "frontier.md"
    try:
        file.write_text(report(examine(out, number, towers.split(","))))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    typer.echo(file)


@app.command()
def ablation(
    out: Annotated[Path, typer.Option(help="answers, reports, figures")] = Path(
        "results/nano/ablation"
    ),
    number: Annotated[int, typer.Option(min=4, help="questions of each set")] = 80,
    towers: Annotated[
        str, typer.Option(help="checkpoints of the family")
    ] = "nodrop,unguided,guided",
) -> None:
    """What each part of cover is worth, tokens by what a picture holds, where it loses; resumes."""
    import torch

    from eval.nano.ablation import ablate, report
    from eval.nano.losses import draw_losses
    from eval.nano.losses import report as report_losses
    from eval.nano.needs import draw_needs

    torch.set_num_threads(1)
    try:
        found = ablate(out, number, towers.split(","))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    (out / "frontier-ablation.md").write_text(report(found))
    draw_needs(found, out / "frontier-tokens.png")
    picture = draw_losses(found, out / "frontier-losses.png")
    (out / "frontier-losses.md").write_text(report_losses(found, picture.name))
    typer.echo(out)


@app.command()
def convert(
    out: Annotated[Path, typer.Option(help="folder to write to")] = Path("results/nano/hf"),
    variant: Annotated[str, typer.Option(help="nodrop, v15 or anyres")] = "nodrop",
) -> None:
    """Write the embedded model for transformers' own LLaVA or LLaVA-NeXT."""
    from eval.nano import CHECKPOINTS
    from llava_hivtp.convert import to_transformers

    if not (CHECKPOINTS / variant).is_dir():
        raise typer.BadParameter(f"choose nodrop, v15 or anyres, got {variant}")
    typer.echo(to_transformers(CHECKPOINTS / variant, out / variant))


@app.command()
def compare(
    out: Annotated[Path, typer.Option(help="file to write")] = Path("results/nano/converted.md"),
    folder: Annotated[Path, typer.Option(help="data, converted models, answers")] = Path(
        "results/nano/compare"
    ),
    rows: Annotated[str, typer.Option(help="Rows of Tables 1 and 2.")] = "full hivtp-25",
    limit: Annotated[int | None, typer.Option(min=1, help="First N questions per set.")] = None,
) -> None:
    """Ask the official and the converted models the same; goes on after a stop."""
    import torch

    from eval.run.quiet import prepare_process

    prepare_process()
    from eval.nano.converted import PARTS, Comparison
    from eval.nano.converted import compare as compare_all

    torch.set_num_threads(1)
    parts = [Comparison(folder, variant, rows, limit) for variant in PARTS]
    typer.echo(compare_all(parts, out))


@app.command()
def field(
    out: Annotated[Path, typer.Option(help="data, results, report")] = Path("results/nano/field"),
    as_is: Annotated[
        bool, typer.Option("--as-is", help="Show what is there, of whatever code; ask nothing.")
    ] = False,
) -> None:
    """Ask the field's table on the embedded model, and compare; goes on after a stop."""
    from eval.nano.field import Field, run_field

    table, numbers = run_field(Field(out, as_is=as_is))
    (out / "field.md").write_text(f"{table}\n")
    (out / "field.csv").write_text(numbers)
    typer.echo(table)


@app.command()
def tune(
    out: Annotated[Path, typer.Option(help="data, trainings, results")] = Path("results/nano/tune"),
    trainer: Annotated[
        Path, typer.Option(help="the Python of transformers 4.37.2, which LLaVA's trainer needs")
    ] = Path(".venv-4.37.2/bin/python"),
    pictures: Annotated[int, typer.Option(min=1, help="to train on")] = 2500,
    size: Annotated[
        str, typer.Option(help="quick: 40 questions per set; sample: 160; full: 400")
    ] = "quick",
) -> None:
    """Tune under HIVTP, and compare before and after; the same command goes on after a stop."""
    from eval.nano.tuning import Tuning, run_tuning

    if not trainer.is_file():
        raise typer.BadParameter(f"no {trainer}: make setup TRANSFORMERS=4.37.2")
    typer.echo(run_tuning(Tuning(out, trainer, pictures, size=size)))


@app.command()
def served(
    out: Annotated[Path, typer.Option(help="checkpoint, data, results")] = Path(
        "results/nano/served"
    ),
    batch: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 16,
    report: Annotated[Path | None, typer.Option(help="Markdown file; else only printed.")] = None,
) -> None:
    """Ask the quick sets in process and through vLLM, and count the answers that differ."""
    from eval.nano.served import measure

    text = measure(out.resolve(), batch)
    typer.echo(text)
    if report is not None:
        report.write_text(text)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="data, results, tables")] = Path("results/nano"),
    size: Annotated[
        str, typer.Option(help="quick: 40 questions per set; sample: 160; full: 400")
    ] = "quick",
    rows: Annotated[
        str | None,
        typer.Option(
            help="Rows of Tables 1 and 2, as in 'full,*-25'. By default all; if quick, the paper's "
            "and in Table 1 every other method at one budget."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="First N questions per set, an even number.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes, one core each.")] = 2,
) -> None:
    """Tables 1, 2 and 3 on the embedded model."""
    from eval.nano.demo import Demo, run_demo

    for line in run_demo(Demo(out, size, rows, limit, workers)):
        typer.echo(line)


@app.command(hidden=True)
def work(
    out: Path,
    size: str = "quick",
    rows: str | None = None,
    limit: int | None = None,
    timing: bool = False,
) -> None:
    """What each of the demo's processes does."""
    from eval.nano.demo import Demo
    from eval.nano.demo import work as work_on
    from eval.run.quiet import prepare_process

    prepare_process()
    work_on(Demo(out, size, rows, limit), timing)


if __name__ == "__main__":
    app()
