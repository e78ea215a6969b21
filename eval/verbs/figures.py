"""`python -m eval figures`: the paper's figures, on any image, benchmark or checkpoint."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from eval.verbs.options import says_errors


@says_errors
def figures(
    images: Annotated[list[Path] | None, typer.Argument(help="Images of your own.")] = None,
    question: Annotated[str, typer.Option(help="Asked about them.")] = "What is in the image?",
    model: Annotated[str | None, typer.Option(help="Checkpoint; default: the embedded.")] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="A further method, such as path/file.py:Class or fopru:keep=0.1."),
    ] = None,
    task: Annotated[str, typer.Option(help="Benchmark to take questions from.")] = "pope",
    data: Annotated[Path | None, typer.Option(help="Folder that mirrors the hub.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many questions to draw.")] = 2,
    block: Annotated[int, typer.Option(help="r_max in percent: 75, 50, 40 or 25.")] = 50,
    layout: Annotated[str, typer.Option(help="Of AnyRes tiles: unpad or mosaic.")] = "unpad",
    flips: Annotated[
        bool, typer.Option("--flips", help="Only: answers that the local stage sets right.")
    ] = False,
    limit: Annotated[int | None, typer.Option(help="Questions to search for flips.")] = None,
    table: Annotated[
        Path | None, typer.Option(help="Only: a Pareto plot of this table's stored results.")
    ] = None,
    results: Annotated[Path, typer.Option(help="Where those are stored.")] = Path("results"),
    out: Annotated[Path, typer.Option(help="Folder of the figures.")] = Path("results/figures"),
) -> None:
    """Draw the method, heat maps, kept tokens with answers, and all methods: PNG and PDF."""
    if table is not None:
        from eval.report.pareto import make_pareto

        return make_pareto(table, results, model, out)
    from llava_hivtp.quiet import quieten

    quieten()
    from eval.figures.make import Methods, make_figures, make_flips
    from eval.figures.questions import ImageQuestion, benchmark_questions, data_of
    from eval.nano import EMBEDDED
    from eval.plan.tower import check_tiles
    from llava_hivtp.images import open_image
    from llava_hivtp.loading import load

    methods = Methods(block, method or ())
    asked = [ImageQuestion(open_image(path), question) for path in images or ()]
    check_tiles(model or EMBEDDED, "figures")
    llava, tokenizer, _, _ = load(model or EMBEDDED, layout=layout)
    if not asked:
        tiled = llava.aspect == "anyres"
        folder = data or data_of(model or EMBEDDED, tiled=tiled, full=flips)
        asked = islice(benchmark_questions(task, folder), limit if flips else samples)
    if flips:
        return make_flips(llava, tokenizer, asked, methods, out, keep=samples)
    return make_figures(llava, tokenizer, list(asked), methods, out)
