"""`python -m eval.serving`: requests per second and KV cache per request, pruned and not."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer

from eval.serving.engine import Load
from eval.serving.throughput import measure
from eval.untrained.random_hf_llava import random_hf_llava
from eval.untrained.shapes import Encoder, Shape, shape

SMALL = "small"


def main(
    model: Annotated[str, typer.Option(help="A published shape, such as llava-v1.5-7b.")] = SMALL,
    requests: Annotated[int, typer.Option(help="Requests at a time.")] = 8,
    new: Annotated[int, typer.Option(help="Tokens of an answer.")] = 8,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 5,
    dtype: Annotated[str, typer.Option(help="By default float16 on a GPU.")] = "",
    cache: Annotated[int, typer.Option(help="MiB of KV cache of each engine.")] = 512,
    out: Annotated[Path | None, typer.Option(help="Markdown file; else only printed.")] = None,
) -> None:
    """Measure stock vLLM, the plug-in off and on, at 100, 50 and 25 % of the tokens."""
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        torch.set_num_threads(1)
        os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    tower = Encoder(width=384, mlp=1536, layers=12, heads=6)
    chosen = Shape(768, 2048, 6, 12, 12, tower=tower) if model == SMALL else shape(model)
    if chosen.anyres:
        raise typer.BadParameter(f"--model {model}: only shapes of LLaVA-1.5")
    with tempfile.TemporaryDirectory() as folder:
        random_hf_llava(folder, chosen, weights=False)
        kind = dtype or ("float16" if on_gpu else "float32")
        side = chosen.tower.side
        load = Load(Path(folder), requests, new, kind, cache << 20, (side, side), not on_gpu)
        report = measure(chosen, load, rounds, torch.device("cuda" if on_gpu else "cpu"))
    print(report)
    if out is not None:
        out.write_text(report)


if __name__ == "__main__":
    typer.run(main)
