"""Every method beside the others: tokens it keeps, time it takes to choose them, lines of code.

The vision tower has the shape of a published one and random weights: neither the counts of methods
with a fixed budget nor the times depend on the weights.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from eval import machine
from eval.clock import Spread, Watch, interleave, timed
from eval.markdown import pipes
from eval.plan.table import Row
from eval.untrained.models import random_projector, random_tower
from eval.untrained.shapes import Shape
from llava_hivtp.pruners import LayerPruner
from llava_hivtp.vision import VisionFeatures, encode_tiles

TILE_GRIDS = {1: (0, 0), 3: (2, 1), 4: (3, 1), 5: (2, 2)}  # tiles -> (columns, rows) of LLaVA-NeXT
_TOWER = ""  # no id of a row
WORDS = 32  # tokens of the question, for methods that ask


@dataclass
class MethodCost:
    """What the rows of one method keep and cost, per number of tiles."""

    pruner: str
    lines: int  # of code
    kept: dict[int, list[int]] = field(default_factory=dict)  # one per row
    seconds: dict[int, list[float]] = field(default_factory=dict)  # median of `select`, per row


@dataclass
class MethodTable:
    """All methods, and the tower they are compared with."""

    methods: dict[str, MethodCost]
    tower: dict[int, float]  # median seconds per number of tiles
    warnings: list[str]

    def markdown(self) -> str:
        """One line per method; its share is that of its slowest row."""
        rows = [
            ["method"]
            + [f"kept, {n} tile{'s' * (n > 1)}" for n in self.tower]
            + [f"select / tower, {n}" for n in self.tower]
            + ["lines of code"]
        ]
        for method in self.methods.values():
            kept = [" ".join(map(str, method.kept[n])) for n in self.tower]
            cost = [f"{max(method.seconds[n]) / self.tower[n]:.2%}" for n in self.tower]
            rows.append([method.pruner, *kept, *cost, str(method.lines)])
        return pipes(rows, left=1 + len(self.tower))


def compare(
    rows: Sequence[Row],
    shape: Shape,
    tile_counts: Iterable[int],
    rounds: int,
    device: torch.device,
    dtype: torch.dtype,
) -> str:
    """The table of methods for a model's shape, and below it what was measured where."""
    torch.manual_seed(0)
    tower = random_tower(shape.tower).to(device, dtype)
    project = random_projector(shape).to(device, dtype)
    inside = {row.id for row in rows if isinstance(row.build(), LayerPruner)}
    found = measure(
        [row for row in rows if row.id not in inside], tower, project, tile_counts, rounds
    )
    spent = ", ".join(f"{1000 * seconds:.0f} ms for {n}" for n, seconds in found.tower.items())
    threads = torch.get_num_threads()
    clock = "wall time" if device.type == "cuda" else f"CPU time, threads {threads}"
    said = [f"WARNING: {warning}." for warning in found.warnings]
    if inside:
        said.append(f"Not here, as they choose inside the language model: {', '.join(inside)}.")
    said.append(
        f"One random image per number of tiles; kept in the order of the table's rows. Vision "
        f"tower: {spent}. Medians of {rounds} interleaved rounds. "
        f"{machine.device_name(device)}, {clock}, {str(dtype).removeprefix('torch.')}."
    )
    return "\n\n".join([found.markdown(), *said])


@torch.no_grad()
def measure(
    rows: Sequence[Row],
    tower: nn.Module,
    project: nn.Module,
    tile_counts: Iterable[int],
    rounds: int,
) -> MethodTable:
    """Every row's choice and the tower, in turn."""
    pruners = {row.id: row.build() for row in rows}
    taps = {layer for pruner in pruners.values() for layer in pruner.layers}
    device, depth = next(tower.parameters()).device, tower.config.num_hidden_layers - 1
    watch = Watch(device)
    table = MethodTable({row.pruner: MethodCost(row.pruner, _lines(row)) for row in rows}, {}, [])
    for count in tile_counts:
        pixels = _pixels(tower, count)
        hidden, tap = encode_tiles(tower, pixels, depth, taps)
        features = VisionFeatures(
            tokens=hidden[:, 1:],
            cls=hidden[:, 0],
            queries=tap.queries,
            keys=tap.keys,
            project=project,
            half_project=project[:-1],
            tile_grid=TILE_GRIDS[count],
            question=_question(project, hidden),
        )
        runs = {_TOWER: partial(encode_tiles, tower, pixels, depth)}
        runs |= {name: partial(pruner.select, features) for name, pruner in pruners.items()}
        timings = {name: partial(timed, run, device, cpu_time=True) for name, run in runs.items()}
        seconds = interleave(timings, rounds, watch=watch)
        table.tower[count] = Spread.of(seconds[_TOWER]).median
        for row in rows:
            method = table.methods[row.pruner]
            method.kept.setdefault(count, []).append(len(pruners[row.id].select(features)))
            method.seconds.setdefault(count, []).append(Spread.of(seconds[row.id]).median)
    if device.type == "cuda":  # on a CPU only our own work is counted
        table.warnings += watch.warnings()
    return table


def _pixels(tower: nn.Module, tiles: int) -> Tensor:
    side = tower.config.image_size
    pixels = torch.randn(tiles, 3, side, side, generator=torch.Generator().manual_seed(tiles))
    return pixels.to(next(tower.parameters()))


def _question(project: nn.Module, hidden: Tensor) -> Tensor:
    """WORDS random embedded tokens, for methods that ask."""
    width = project(hidden[:1, :1]).shape[-1]
    return torch.randn(WORDS, width, generator=torch.Generator().manual_seed(0)).to(hidden)


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
