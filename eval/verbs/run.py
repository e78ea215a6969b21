"""Evaluate a table, unit by unit; whatever stops it, the next run goes on from there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from eval import ROOT
from eval.benchmarks.records import BENCHMARKS
from eval.plan.table import Table, load_table, select_rows, select_tasks
from eval.plan.units import Unit
from eval.results.shelf import Shelf
from eval.run.engine import Engine
from eval.run.estimate import plan
from eval.run.job import Job, Stopped
from eval.run.preflight import check, metrics_missing, problems
from eval.run.quiet import prepare_process
from eval.verbs.options import Config, Data, Limit, Model, Out, Rows, Tasks, says_errors

MODEL_ARGS = ("dtype", "device_map", "attn_implementation", "quantization", "conv_template")
MODEL_ARGS += ("workers",)  # threads that read and prepare ahead
MODEL_ARGS += ("max_side", "max_aspect")  # of an image


@says_errors
def run(
    config: Config,
    model: Model = None,
    rows: Rows = None,
    tasks: Tasks = None,
    limit: Limit = None,
    batch: Annotated[
        str, typer.Option(help="Batch size of the accuracy pass; auto: what fits into memory.")
    ] = "1",
    out: Out = Path("results"),
    data: Data = Path("data"),
    shard: Annotated[
        str | None, typer.Option(help="i/n, from 1: every n-th unit, from the i-th on.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show units and hours only.")] = False,
    calibrate: Annotated[
        int | None,
        typer.Option(min=1, help="With --dry-run: answer requests for so many seconds, as 60."),
    ] = None,
    timing: Annotated[bool, typer.Option(help="Also time requests, one by one.")] = True,
    timing_n: Annotated[int, typer.Option(min=1, help="Timed requests per task.")] = 100,
    model_args: Annotated[
        str, typer.Option(help=f"Such as dtype=bfloat16,device_map=auto; of {MODEL_ARGS}.")
    ] = "",
    zero3: Annotated[
        bool, typer.Option("--zero3", help="Spread the model over torchrun's processes; no times.")
    ] = False,
    engine: Annotated[
        str | None, typer.Option(help="vllm: serves the accuracy pass, --batch requests at a time.")
    ] = None,
    engine_env: Annotated[
        Path, typer.Option(help="Virtual environment that has vLLM and this package.")
    ] = ROOT / ".venv-vllm",
    engine_args: Annotated[
        str, typer.Option(help="Further arguments of `vllm serve`, as in '--max-num-seqs 64'.")
    ] = "",
) -> None:
    """Evaluate the rows of a table; finished units are skipped, begun ones resumed."""
    prepare_process()
    table = load_table(config, model)
    shelf = _choose(table, out.resolve(), rows, tasks, limit, shard)
    arguments = _arguments(model_args) | ({"zero3": True} if zero3 else {})
    size = _batch(batch)
    timed = timing_n if timing and not zero3 else 0
    if callable(size) and zero3:
        raise ValueError("--batch auto is each process's own: with --zero3 give a number")
    if calibrate and not dry_run:
        raise ValueError("--calibrate measures for a plan: give --dry-run as well")
    served = _engine(engine, engine_env, engine_args)
    if served and (callable(size) or calibrate):
        raise ValueError("--batch auto and --calibrate are of the model in this process")
    parts = shelf.by_checkpoint()
    if dry_run:
        paces = None
        if calibrate:
            each = (_measured(part, data, size, arguments, calibrate) for part in parts)
            paces = {row: pace for found in each for row, pace in found.items()}
        typer.echo(plan(shelf, timed, paces))
        each = (problems(part, part.units, data, arguments, served) for part in parts)
        stops = [line for lines in each for line in lines]
        stops += metrics_missing(shelf.units)
        said = "".join(f"\nwould stop the run: {line}" for line in dict.fromkeys(stops))
        typer.echo(said, nl=bool(stops))
        return
    try:
        given = (data.resolve(), size, timed, arguments, served)
        jobs = [Job(part, *given) for part in parts]
        failed = sum(job.run() for job in jobs)
    except Stopped as stop:
        typer.echo(f"{stop}; the same command goes on from here", err=True)
        raise typer.Exit(128 + stop.number) from stop
    if failed:
        raise typer.Exit(1)


def _measured(
    shelf: Shelf,
    data: Path,
    batch: int | Callable[[Any], int],
    arguments: dict[str, Any],
    seconds: int,
) -> dict[str, float]:
    """Seconds per request of every row, measured here."""
    from eval.run.calibrate import calibrate
    from eval.run.worker import Worker

    check(shelf, shelf.units, data, arguments)
    worker = Worker(shelf, batch, data.resolve(), arguments)
    return calibrate(worker, shelf.rows, shelf.tasks[0], seconds)


def _choose(
    table: Table,
    out: Path,
    rows: str | None,
    tasks: str | None,
    limit: int | None,
    shard: str | None,
) -> Shelf:
    names = select_tasks(table, tasks)
    for name in names:
        BENCHMARKS[name].check_run(limit)
    shelf = Shelf(table, out, select_rows(table, rows), names, limit)
    if shard is not None:
        shelf.units = _shard(shelf.units, shard)
    return shelf


def _shard(chosen: list[Unit], shard: str) -> list[Unit]:
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    number, count = (int(part) for part in match.groups()) if match else (0, 0)
    if not 1 <= number <= count:
        raise ValueError(f"--shard must be i/n with 1 <= i <= n, such as 1/4; got {shard!r}")
    return chosen[number - 1 :: count]


def _engine(name: str | None, environment: Path, arguments: str) -> Engine | None:
    if name is None:
        return None
    if name != "vllm":
        raise ValueError(f"--engine takes vllm, got {name!r}")
    return Engine(environment.absolute(), tuple(shlex.split(arguments)))


def _batch(spelled: str) -> int | Callable[[Any], int]:
    """A number, or what finds one for a loaded model."""
    if spelled == "auto":
        from eval.efficiency.fit import fitting_batch

        return fitting_batch
    if not spelled.isdecimal() or not int(spelled):
        raise ValueError(f"--batch takes a number from 1 or auto, got {spelled!r}")
    return int(spelled)


def _arguments(text: str) -> dict[str, str]:
    """`dtype=bfloat16,device_map=auto` as a mapping."""
    from llava_hivtp.pruners import read_arguments

    arguments = read_arguments(text)
    if set(arguments) - set(MODEL_ARGS):
        raise ValueError(f"--model-args takes key=value of {', '.join(MODEL_ARGS)}; got {text!r}")
    return arguments
