"""`python -m eval figures`: the paper's figures, on any image, benchmark or checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from eval.figures.draw import Picture
    from eval.figures.samples import Asked
    from llava_hivtp.pruners import Pruner

# r_max in percent -> k and c of HIVTP in the paper's Table 1, and k of the same budget without c.
BLOCKS = {75: (50, 2, 75), 50: (25, 2, 50), 40: (15, 2, 39), 25: (14, 3, 25)}


def figures(
    images: Annotated[list[Path] | None, typer.Argument(help="Images of your own.")] = None,
    question: Annotated[str, typer.Option(help="Asked about them.")] = "What is in the image?",
    model: Annotated[str | None, typer.Option(help="Checkpoint; default: the embedded.")] = None,
    task: Annotated[str, typer.Option(help="Benchmark to take samples from.")] = "pope",
    data: Annotated[Path | None, typer.Option(help="Folder that mirrors the hub.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many samples to draw.")] = 2,
    block: Annotated[int, typer.Option(help=f"r_max in percent, of {list(BLOCKS)}.")] = 50,
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
    if block not in BLOCKS:
        raise typer.BadParameter(f"--block must be one of {list(BLOCKS)}, got {block}")
    from eval.figures.samples import read_samples

    try:
        if table is not None:
            _pareto(table, results, model, out)
            return
        llava, tokenizer = _load(model, layout)
        if images:
            asked, samples = _own_images(images, question), len(images)
        else:
            asked = read_samples(task, data or _own_data(model, llava, flips))
        if flips:
            _flips(llava, tokenizer, asked, limit, block, samples, out)
        else:
            _draw_all(llava, tokenizer, list(islice(asked, samples)), block, out)
    except (OSError, ValueError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error


def _draw_all(llava: Any, tokenizer: Any, asked: list[Asked], block: int, out: Path) -> None:
    from eval.figures.flips import WITH, answer_all
    from eval.figures.look import look
    from eval.figures.panels import draw_heat, draw_methods, draw_samples
    from eval.figures.schematic import draw_schematic

    depth = llava.get_vision_tower().config.num_hidden_layers
    pruners = _with_and_without(depth, block)
    _save(draw_schematic(), out / "method", "Figure 1, the method")
    looks = [look(llava, one.image, range(1, depth + 1)) for one in asked]
    heat = draw_heat(looks, scored=pruners[WITH].layers)
    _save(heat, out / "heat", "Figures 2 and 4-9, importance in every encoder layer")
    drawn = [answer_all(llava, tokenizer, one, pruners) for one in asked]
    _save(draw_samples(drawn), out / "stages", "Figures 3 and 10-13, kept tokens and answers")
    looks = {}
    for title, pruner in _methods(depth, block).items():
        llava.pruner = pruner
        looks[title] = look(llava, asked[0].image)
    _save(draw_methods(asked[0].image, looks), out / "methods", f"every method at {block} %")


def _flips(
    llava: Any,
    tokenizer: Any,
    asked: Iterable[Asked],
    limit: int | None,
    block: int,
    samples: int,
    out: Path,
) -> None:
    from tqdm import tqdm

    from eval.figures.flips import find_flips
    from eval.figures.panels import draw_samples
    from eval.results.store import write_json_atomic

    depth = llava.get_vision_tower().config.num_hidden_layers
    pruners = _with_and_without(depth, block)
    found = find_flips(llava, tokenizer, tqdm(islice(asked, limit)), pruners, keep=samples)
    write_json_atomic(out / "flips.json", found.summary())
    typer.echo(json.dumps(found.summary(), indent=1))
    typer.echo(out / "flips.json")
    if found.samples:
        words = "Figure 3, answered right only with the local stage"
        _save(draw_samples(found.samples), out / "flips", words)


def _pareto(config: Path, results: Path, model: str | None, out: Path) -> None:
    from eval.plan.table import load_table
    from eval.report.pareto import draw_pareto
    from eval.results.collect import collect

    table = load_table(config, model)
    figure = draw_pareto(collect(table, table.rows, results, tests=False))
    if figure is None:
        raise ValueError(f"{results} holds too few finished rows of {config}: run them first")
    _save(figure, out / f"pareto-{config.stem}", "accuracy against kept tokens and TTFT")


def _with_and_without(depth: int, block: int) -> dict[str, Pruner]:
    from eval.figures.flips import WITH, WITHOUT
    from eval.figures.look import fitted

    k, c, alone = BLOCKS[block]
    return {
        WITH: fitted("hivtp", depth, k=k, c=c),
        WITHOUT: fitted("hivtp", depth, k=alone, c=None),
    }


def _methods(depth: int, block: int) -> dict[str, Pruner]:
    """Every registered method at one budget, HIVTP first."""
    from eval.figures.look import fitted
    from eval.report.table import METHODS
    from llava_hivtp.pruners import PRUNERS

    k, c, _ = BLOCKS[block]
    methods = {METHODS["hivtp"]: fitted("hivtp", depth, k=k, c=c)}
    for name in PRUNERS:
        if name not in ("none", "hivtp"):
            methods[METHODS.get(name, name)] = fitted(name, depth, keep=block / 100)
    return methods


def _load(model: str | None, layout: str) -> tuple[Any, Any]:
    from eval.figures.samples import embedded_model
    from llava_hivtp import load

    llava, tokenizer, _, _ = load(model or embedded_model(), layout=layout)
    return llava, tokenizer


def _own_data(model: str | None, llava: Any, full: bool) -> Path:
    """The embedded model's own world; another model reads what was fetched."""
    from eval import ROOT
    from eval.figures.samples import embedded_data

    if model is not None and ROOT not in Path(model).resolve().parents:
        return Path("data")
    tiled = getattr(llava.config, "image_aspect_ratio", None) == "anyres"
    return embedded_data("large" if tiled else "small", "full" if full else "quick")


def _own_images(images: list[Path], question: str) -> Iterable[Asked]:
    from eval.figures.samples import Asked
    from llava_hivtp.images import open_image

    return [Asked(open_image(path), question) for path in images]


def _save(figure: Picture, stem: Path, what: str) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    for suffix in ("png", "pdf"):
        figure.savefig(f"{stem}.{suffix}")
    typer.echo(f"{stem}.png, .pdf: {what}")
