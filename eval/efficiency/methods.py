"""Every method beside the others: tokens it keeps, time it takes to choose them, lines of code.

The vision tower has the shape of CLIP ViT-L/14-336 and random weights: neither the counts of
methods with a fixed budget nor the times depend on the weights.
"""

from __future__ import annotations

import ast
import inspect
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eval.plan.table import Row, load_table, select_rows
from eval.report import text

if TYPE_CHECKING:
    import torch
    from torch import nn

    from llava_hivtp.vision import VisionFeatures

TILE_GRIDS = {1: (0, 0), 3: (2, 1), 4: (3, 1), 5: (2, 2)}  # tiles -> (columns, rows) of LLaVA-NeXT


@dataclass
class Measured:
    """What the rows of one method keep and cost, per number of tiles."""

    pruner: str
    lines: int
    kept: dict[int, list[int]] = field(default_factory=dict)  # one per row
    seconds: dict[int, list[float]] = field(default_factory=dict)  # median of `select`, per row


def methods(
    config: Annotated[Path, typer.Argument(help="The table whose rows to measure.")] = Path(
        "configs/table1.yaml"
    ),
    rows: Annotated[
        str | None, typer.Option(help="Ids, patterns, numbers or sets, as in 'paper,random-*'.")
    ] = None,
    tiles: Annotated[str, typer.Option(help="Tiles per image, 1 or 3 to 5 each.")] = "1,5",
    repeats: Annotated[int, typer.Option(min=1, help="Runs behind each median.")] = 5,
    device: Annotated[str, typer.Option(help="Where to run, such as cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Of tower and tokens.")] = "float32",
) -> None:
    """Print tokens kept and time of choosing them, as a share of the vision tower's time."""
    import torch

    counts = _counts(tiles)
    chosen = select_rows(load_table(config), rows)
    tower, project = vision_tower(), projector()
    place = {"device": torch.device(device), "dtype": getattr(torch, dtype)}
    tower, project = tower.to(**place), project.to(**place)
    times, found = measure(chosen, tower, project, counts, repeats)
    table = [
        ["method"]
        + [f"kept, {n} tile{'s' * (n > 1)}" for n in counts]
        + [f"select / tower, {n}" for n in counts]
        + ["lines of code"]
    ]
    for method in found.values():
        kept = [" ".join(map(str, method.kept[n])) for n in counts]
        cost = [f"{max(method.seconds[n]) / times[n]:.2%}" for n in counts]
        table.append([method.pruner, *kept, *cost, str(method.lines)])
    typer.echo(text.pipes(table, left=1 + len(counts)))
    spent = ", ".join(f"{1000 * times[n]:.0f} ms for {n}" for n in counts)
    typer.echo(
        f"\nOne random image per number of tiles; kept in the order of {config}. Vision tower: "
        f"{spent}. Medians of {repeats}; a method's share is that of its slowest row. "
        f"{_where(place['device'])}, {dtype}."
    )


def measure(
    rows: tuple[Row, ...],
    tower: nn.Module,
    project: nn.Module,
    tile_counts: list[int],
    repeats: int,
) -> tuple[dict[int, float], dict[str, Measured]]:
    """Median seconds of the tower per number of tiles, and every method's measurements."""
    import torch

    from llava_hivtp.vision import encode_tiles

    pruners = [row.build() for row in rows]
    taps = {layer for pruner in pruners for layer in pruner.layers}
    depth = tower.config.num_hidden_layers - 1
    times = {}
    found = {row.pruner: Measured(row.pruner, _lines(row)) for row in rows}
    for count in tile_counts:
        features = _features(tower, project, count, taps)
        pixels = _pixels(tower, count)
        times[count] = _median(lambda x=pixels: encode_tiles(tower, x, depth), repeats, tower)
        for row, pruner in zip(rows, pruners, strict=True):
            with torch.no_grad():
                kept = pruner.select(features)
            seconds = _median(lambda p=pruner, f=features: p.select(f), repeats, tower)
            found[row.pruner].kept.setdefault(count, []).append(len(kept))
            found[row.pruner].seconds.setdefault(count, []).append(seconds)
    return times, found


def vision_tower(width: int = 1024, heads: int = 16, layers: int = 24) -> nn.Module:
    """A CLIP vision tower of 24 x 24 patches with random weights."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=336,
        patch_size=14,
    )
    return CLIPVisionModel(config).eval()


def projector(width: int = 1024, out: int = 4096) -> nn.Module:
    """LLaVA's two-layer projector with random weights."""
    from torch import nn

    return nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))


def _features(tower: nn.Module, project: nn.Module, tiles: int, taps: set[int]) -> VisionFeatures:
    import torch

    from llava_hivtp.vision import VisionFeatures, encode_tiles

    with torch.no_grad():
        depth = tower.config.num_hidden_layers - 1
        hidden, tap = encode_tiles(tower, _pixels(tower, tiles), depth, taps)
    return VisionFeatures(
        tokens=hidden[:, 1:],
        cls=hidden[:, 0],
        queries=tap.queries,
        keys=tap.keys,
        project=project,
        tile_grid=TILE_GRIDS[tiles],
    )


def _pixels(tower: nn.Module, tiles: int) -> torch.Tensor:
    import torch

    side = tower.config.image_size
    pixels = torch.randn(tiles, 3, side, side, generator=torch.Generator().manual_seed(tiles))
    return pixels.to(next(tower.parameters()))


def _median(run: Callable[[], object], repeats: int, tower: nn.Module) -> float:
    """Median seconds of `run`, behind one run that is not counted.

    Wall time on a GPU; on a CPU, which others may be using, the time it worked for us.
    """
    import torch

    device = next(tower.parameters()).device
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    seconds = []
    with torch.no_grad():
        for _ in range(1 + repeats):
            start = clock()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(clock() - start)
    return statistics.median(seconds[1:])


def _lines(row: Row) -> int:
    """Lines of code in the file of the row's method: no comments, no docstrings, no blanks."""
    source = Path(inspect.getfile(type(row.build()))).read_text()
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    texts = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            texts.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = (line.strip() for i, line in enumerate(source.splitlines(), 1) if i not in texts)
    return sum(bool(line) and not line.startswith("#") for line in lines)


def _counts(tiles: str) -> list[int]:
    try:
        counts = [int(part) for part in tiles.split(",")]
    except ValueError:
        counts = []
    if not counts or not set(counts) <= set(TILE_GRIDS):
        raise typer.BadParameter(f"--tiles must be of {list(TILE_GRIDS)}, got {tiles!r}")
    return counts


def _where(device: torch.device) -> str:
    import torch

    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, wall time"
    return f"CPU time, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
