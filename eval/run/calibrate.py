"""How fast this machine answers a table's requests, from a minute of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import fmean

from eval.clock import interleave
from eval.plan.table import Row
from eval.run import harness as official
from eval.run.worker import Worker

ROUNDS = 1000  # more than fit


def calibrate(worker: Worker, rows: Sequence[Row], task: str, seconds: float) -> dict[str, float]:
    """Seconds per request of every row, at the worker's batch size.

    The rows of the most and of the fewest tokens answer the same documents in turn for `seconds`,
    one batch each at least; the others lie on the line through the two. What a method's own choice
    costs is taken as that of these two.

    Args:
        worker: holds the model.
        rows: with different budgets or not.
        task: whose first documents are asked.
        seconds: how long.
    """
    lm = worker.lm
    instances = official.requests(lm, official.load_task(task, worker.folder), lm.batch_size)
    depth = len(lm.model.get_decoder().layers)
    tokens = {row.id: _tokens(row, worker.patches, depth) for row in rows}
    most, least = (choose(rows, key=lambda row: tokens[row.id]) for choose in (max, min))

    def answer(row: Row) -> float:
        lm.model.pruner = row.build()
        begun = time.perf_counter()
        lm.generate_until(instances)
        return (time.perf_counter() - begun) / len(instances)

    runs = {row.id: lambda row=row: answer(row) for row in (most, least)}
    found = interleave(runs, ROUNDS, warmup=1, until=time.monotonic() + seconds)
    paces = {name: sum(each) / len(each) for name, each in found.items()}
    span = tokens[most.id] - tokens[least.id]
    slope = (paces[most.id] - paces[least.id]) / span if span else 0.0
    return {
        name: paces[least.id] + slope * (count - tokens[least.id]) for name, count in tokens.items()
    }


def _tokens(row: Row, patches: int, depth: int) -> float:
    """Of one tile, in the mean layer of the language model."""
    pruner = row.build()
    return fmean(pruner.per_layer(pruner.budget(1, patches), depth))
