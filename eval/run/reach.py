"""The `reach` of a method at which images have so many tokens on average, from a sample of them.

A patch stays where the method's `needed_above` lies below `reach`, so one pass over a sample says
how many tokens every value makes.
"""

from __future__ import annotations

import itertools
import json
import random
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.benchmarks import data
from eval.digests import text_digest
from eval.plan.table import Calibration, Row, Table
from eval.results import store
from eval.results.shelf import Shelf
from eval.run import harness as official
from eval.run.preflight import check
from eval.run.progress import Progress
from eval.run.worker import Worker
from llava_hivtp.answer import prepare_pixels
from llava_hivtp.anyres import inside
from llava_hivtp.families.base import Picture

WITHIN = 0.5  # tokens of the mean


@dataclass(frozen=True)
class Draw:
    """Questions of a task, drawn at random from those about an image."""

    task: str
    sample: int = 200
    seed: int = 0


@dataclass(frozen=True)
class Needs:
    """Of the images of one question."""

    above: list[float]  # the `reach` above which each token stays
    total: int  # tokens had nothing been pruned


def calibrate_row(
    table: Table, row: Row, draw: Draw, tokens: float, out: Path, folder: Path
) -> dict[str, Any]:
    """The entry of a row whose images have `tokens` on average, as a table's YAML holds it.

    Args:
        table: whose checkpoint and layout are used.
        row: what it keeps at most is the cap.
        draw: the questions.
        tokens: patch tokens of an image in the language model.
        out: of the results; what was looked at is remembered there.
        folder: of the data.

    Raises:
        ValueError: if the method has no `reach`, or none gives this mean.
    """
    rest = {name: value for name, value in row.arguments.items() if name != "reach"}
    open_row = replace(row, arguments=rest, calibration=None)
    if not hasattr(open_row.build(), "needed_above"):
        raise ValueError(f"{row.where}: row '{row.id}': {row.pruner} has no reach, cover has")
    shelf = Shelf(table, out, [open_row], [draw.task])
    check(shelf, shelf.units, folder, {})
    needs = measure(Worker(shelf, 1, folder, {}), open_row, draw, out)
    reach, reached = find_reach([each.above for each in needs], tokens)
    share = 100 * reached * len(needs) / sum(each.total for each in needs)
    name = Path(table.model).name
    found = Calibration(draw.task, draw.sample, draw.seed, name, tokens, round(reached, 2))
    return {
        "id": f"{row.id}-mean-{tokens:g}",
        "pruner": row.pruner,
        **rest,
        "reach": reach,
        "block": min(100, max(1, round(share))),
        "set": "beyond" if row.set == "paper" else row.set,
        "calibrated": asdict(found),
    }


def measure(worker: Worker, row: Row, draw: Draw, out: Path) -> list[Needs]:
    """Look at the images of the questions; goes on after a stop."""
    lm, task = worker.lm, draw.task
    lm.model.pruner = row.build()
    instances = official.requests(lm, official.load_task(task, worker.folder), None)
    random.Random(f"calibrate {draw.seed}").shuffle(instances)
    digest = data.digest(worker.folder, task)
    identity = (worker.protocol, row.pruner, row.arguments, draw.seed, digest, worker.sources(row))
    name = f"{row.pruner}-{task}-{text_digest(repr(identity))[:12]}.jsonl"
    file = out / "calibrations" / name
    found = _read(file)
    asked = (request for request in map(lm.read, instances) if request.images)
    left = itertools.islice(asked, len(found), draw.sample)
    with file.open("a") as lines, Progress(f"images of {task}", draw.sample, len(found)) as bar:
        for request in left:
            given = prepare_pixels(lm.model, request.images, lm.limits)
            found.append(_look(lm.model, given))
            lines.write(json.dumps(asdict(found[-1])) + "\n")
            lines.flush()
            bar.update(1)
    if len(found) < draw.sample:
        raise ValueError(f"{task} has {len(found)} questions about an image, not {draw.sample}")
    return found[: draw.sample]


def _read(file: Path) -> list[Needs]:
    """Whole lines; what a kill cut short is cut off."""
    lines = file.read_text().rpartition("\n")[0].splitlines() if file.is_file() else []
    store.write_atomic(file, lines)
    return [Needs(**json.loads(line)) for line in lines]


@torch.inference_mode()
def _look(model: Any, given: dict[str, Any]) -> Needs:
    """What the pixels of a question's images need."""
    above: list[float] = []
    pictures, total = model.pictures(given), 0
    for features, group in model.encode(pictures, model.pruner.layers):
        features = model.with_projector(features)
        parts = features.split([picture.n_tiles for picture in group])
        for part, picture in zip(parts, group, strict=True):
            found = model.pruner.needed_above(part).cpu()
            shown = found[_shown(picture, part.n_patches)]
            above += shown[shown < torch.inf].tolist()
            total += shown.numel()
    return Needs(above, total)


def _shown(picture: Picture, n_patches: int) -> torch.Tensor:
    """Which patches the layout shows, (T, N) bool."""
    if not any(picture.tile_grid):
        return torch.ones(picture.n_tiles, n_patches, dtype=torch.bool)
    return inside(round(n_patches**0.5), picture.tile_grid, picture.frame)


def find_reach(above: Sequence[Sequence[float]], tokens: float) -> tuple[float, float]:
    """The `reach` at which images have `tokens` on average, and how many they have at it.

    The value has as few decimals as tell it from its neighbours.

    Raises:
        ValueError: if no value comes within half a token.
    """
    values, images = sorted(itertools.chain.from_iterable(above)), len(above)
    least, most = (bisect_left(values, end) / images for end in (1e-9, 1.0))
    if not least <= tokens <= most:
        raise ValueError(
            f"the mean can be {least:g} to {most:g} tokens here, not {tokens:g}: the cap, `keep`, "
            "is the upper end"
        )
    edge = values[max(1, round(tokens * images)) - 1]
    here, behind = bisect_left(values, edge), bisect_right(values, edge)
    beyond = values[behind] if behind < len(values) else 1.0
    ends = [(edge, min(beyond, 1.0)), *([(values[here - 1], edge)] if here else [])]
    found = [_short(low, high) for low, high in ends]
    means = [bisect_left(values, float(np.float32(reach))) / images for reach in found]
    reached, reach = min(zip(means, found, strict=True), key=lambda pair: abs(pair[0] - tokens))
    if abs(reached - tokens) > WITHIN:
        raise ValueError(
            f"no reach comes nearer to {tokens:g} tokens than {reached:g}: many patches are needed "
            "above the same value; take more images or another number"
        )
    return reach, reached


def _short(low: float, high: float) -> float:
    """A number above `low` and not above `high`, as a method in float32 sees it: few decimals."""
    rounded = (round((low + high) / 2, digits) for digits in range(2, 9))
    return next((x for x in rounded if low < float(np.float32(x)) <= high), high)
