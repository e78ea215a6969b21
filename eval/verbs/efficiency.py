"""`python -m eval efficiency`: where the time goes, pruned and not, beside what physics allows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eval.verbs.options import (
    Device,
    Dtype,
    Threads,
    WorkedTime,
    integers,
    says_errors,
    size,
    words,
)

_WEIGHTS = "Instead of a checkpoint: random weights of this shape."
_LAYERS = "Language-model layers of --random-weights, to fit a CPU."
_METHOD = "A method, hivtp:r=2,k=14,c=3; may be repeated."
_ROWS = "Its rows: ids, patterns, numbers, sets."
_SECONDS = "Begin no further round once so many are over; 0: no limit."
_GRAPHS = "Replay tower, prefill and decoding as CUDA graphs."
_CEILINGS = (
    "Print the closed forms alone, no run, for a device of TFLOP/s,GB/s or that of a .csv of this "
    "command."
)


@says_errors
def efficiency(
    model: Annotated[str, typer.Argument(help="Checkpoint, a folder or a hub id.")] = "",
    random_weights: Annotated[str, typer.Option(help=_WEIGHTS)] = "",
    layers: Annotated[int | None, typer.Option(help=_LAYERS)] = None,
    table: Annotated[Path | None, typer.Option(help="Methods of a table's YAML.")] = None,
    rows: Annotated[str, typer.Option(help=_ROWS)] = "paper",
    method: Annotated[list[str] | None, typer.Option(help=_METHOD)] = None,
    sizes: Annotated[
        list[str] | None, typer.Option("--size", help="WIDTHxHEIGHT; may be repeated.")
    ] = None,
    layout: Annotated[str, typer.Option(help="Layouts of AnyRes tiles, by comma.")] = "unpad",
    text: Annotated[int, typer.Option(help="Prompt tokens beside the image.")] = 64,
    new_tokens: Annotated[str, typer.Option(help="Answer lengths, by comma.")] = "2,4,10",
    batch: Annotated[str, typer.Option(help="Batch sizes, by comma.")] = "1",
    rounds: Annotated[int, typer.Option(help="Interleaved rounds after a warm-up.")] = 20,
    seconds: Annotated[float, typer.Option(help=_SECONDS)] = 0,
    device: Device = "",
    dtype: Dtype = "",
    attention: Annotated[str, typer.Option(help="sdpa, eager or flash_attention_2.")] = "sdpa",
    graphs: Annotated[bool, typer.Option(help=_GRAPHS)] = False,
    largest_batch: Annotated[
        bool, typer.Option(help="Also find the largest batch that fits a GPU.")
    ] = False,
    ceilings: Annotated[str, typer.Option(help=_CEILINGS)] = "",
    threads: Threads = 0,
    cpu_time: WorkedTime = False,
    out: Annotated[Path, typer.Option(help="Stem of the files.")] = Path("results/efficiency"),
) -> None:
    """Time every stage of a request: stock LLaVA, nothing pruned, and every method, in turn.

    TTFT runs from prepared pixels in to the first token out, on the host. Preparing pixels takes
    every method the same time; it is printed apart. Every method writes equally many tokens.
    """
    lengths, batches = integers("new-tokens", new_tokens), integers("batch", batch)
    if ceilings:
        from eval.efficiency.expected import closed_forms

        typer.echo(closed_forms(random_weights, ceilings, batches, lengths, text))
        return
    chosen = {"layouts": words("layout", layout), "sizes": tuple(map(size, sizes or ["336x336"]))}
    from eval.efficiency.settings import Settings

    settings = Settings(
        model, random_weights, layers, device, dtype, attention, graphs, threads, cpu_time,
        table, rows, tuple(method or ()), **chosen, text=text, new_tokens=lengths,
        batches=batches, rounds=rounds, seconds=seconds, largest_batch=largest_batch, out=out,
    )  # fmt: skip
    from eval.efficiency.measure import measure

    for said in measure(settings):
        typer.echo(said)
