"""What would stop a run: looked for before any weights are read, and shown by `status`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from eval.benchmarks import data as datasets
from eval.benchmarks.records import BENCHMARKS
from eval.digests import checkpoint_folder
from eval.plan.reader import ConfigError
from eval.plan.serving import unservable
from eval.plan.table import Row
from eval.plan.tower import Tower, misfit, read_tower, trained_with
from eval.plan.units import Unit
from eval.results.shelf import Shelf
from eval.run.engine import Engine

if TYPE_CHECKING:
    from llava_hivtp.pruners import LayerPruner


def check(
    shelf: Shelf,
    units: Sequence[Unit],
    data: Path,
    arguments: Mapping[str, Any],
    engine: Engine | None = None,
) -> None:
    """Raise a ValueError with everything that would stop these units."""
    found = [*problems(shelf, units, data, arguments, engine), *metrics_missing(units)]
    if found:
        raise ValueError("\n".join(found))


def problems(
    shelf: Shelf,
    units: Sequence[Unit],
    data: Path,
    arguments: Mapping[str, Any] | None = None,
    engine: Engine | None = None,
) -> Iterator[str]:
    """What would stop these units: checkpoint, tower, methods, template, data; one line each."""
    tower = None
    try:
        tower = read_tower(shelf.table.model)
        yield from _template(shelf.table.model, (arguments or {}).get("conv_template"))
    except (OSError, ValueError) as error:
        yield str(error)
    wrong = misfit(shelf.table, tower) if tower else None
    if wrong:
        yield wrong
    rows, fit = {unit.row.id: unit.row for unit in units}.values(), []
    for row in rows:
        unfit = list(_row(row, None if wrong else tower))
        yield from unfit
        fit += [] if unfit else [row]
        if row.checkpoint and tower:
            yield from _tuned(row)
    if engine is not None:
        yield from _engine(engine, arguments or {})
        if tower:
            yield from unservable(shelf.table, fit)
    try:
        datasets.check(data, dict.fromkeys(unit.task for unit in units))
    except FileNotFoundError as error:
        yield str(error)


def metrics_missing(units: Iterable[Unit]) -> Iterator[str]:
    """Tasks and metrics that lmms-eval does not have; importing it takes seconds."""
    from eval.run.harness import metric_names

    for task in dict.fromkeys(unit.task for unit in units):
        metric = BENCHMARKS[task].metric
        try:
            known = metric_names(task)
        except ValueError as error:
            yield str(error)
        else:
            if metric not in known:
                yield f"lmms-eval's {task} has no metric {metric}, only {', '.join(sorted(known))}"


def _engine(engine: Engine, arguments: Mapping[str, Any]) -> Iterator[str]:
    """Why there is no engine, or not one of these settings."""
    if engine.missing:
        yield engine.missing
    for name in ("quantization", "conv_template", "zero3"):
        if name in arguments:
            yield f"{name} is of the model in this process and does not go with --engine"


def _row(row: Row, tower: Tower | None) -> Iterator[str]:
    """Why a row's method cannot run in this tower."""
    if row.absent:
        yield f"{row.where}: row '{row.id}': {row.absent}"
        return
    try:
        from llava_hivtp.pruners import LayerPruner

        pruner = row.build()
        if tower:
            pruner.check(tower.layers, tower.patches)
        if tower and tower.language_layers and isinstance(pruner, LayerPruner):
            yield from _over_block(row, pruner, tower)
    except ConfigError as error:
        yield str(error)
    except Exception as error:  # a method of the user's may fail in any way
        yield f"{row.where}: row '{row.id}': {error}"


def _over_block(row: Row, pruner: LayerPruner, tower: Tower) -> Iterator[str]:
    """Why a method inside the language model does not belong into its block."""
    entering = pruner.budget(1, tower.patches)
    read = fmean(pruner.per_layer(entering, tower.language_layers))
    if read > row.block / 100 * tower.patches:
        yield (
            f"{row.where}: row '{row.id}': a layer of the language model's {tower.language_layers} "
            f"reads {read:.1f} of {tower.patches} tokens on average, more than its block of "
            f"{row.block} % allows: lower keep or move the row to another block"
        )


def _tuned(row: Row) -> Iterator[str]:
    """Why a row's own checkpoint is not the one that was tuned under its method."""
    from llava_hivtp.pruners import build_pruner

    said = trained_with(row.checkpoint) or {"pruner": "none", "arguments": []}
    rules = [build_pruner(said["pruner"], **each) for each in said["arguments"]]
    if row.build() not in rules:
        yield (
            f"{row.where}: row '{row.id}': {row.checkpoint} was not tuned under this method, but "
            f"under {', '.join(map(str, rules)) or 'none'}"
        )


def _template(model: str, given: str | None) -> Iterator[str]:
    """Why there is no conversation template; one is named rarely, and LLaVA takes seconds."""
    folder = checkpoint_folder(model)
    named = given or json.loads((folder / "config.json").read_bytes()).get("conv_template")
    if named is None:
        return
    from llava_hivtp.conversation import template_name

    try:
        template_name(model, None, named)
    except ValueError as error:
        yield str(error)
