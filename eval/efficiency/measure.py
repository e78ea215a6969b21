"""Where the time of a request goes, pruned and not, beside what physics allows."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import torch

from eval import machine
from eval.efficiency.cases import bases, spelled_cases, table_cases
from eval.efficiency.files import Files
from eval.efficiency.settings import Settings
from eval.efficiency.timed_model import TimedModel
from eval.plan.table import load_table, select_rows
from eval.plan.tower import check_tiles
from llava_hivtp.pruners import read_pruner


def measure(settings: Settings) -> Iterator[str]:
    """Time every case of every setting and write the files; yields what to show meanwhile."""
    if settings.model:
        check_tiles(settings.model, "efficiency")
    end = time.monotonic() + (settings.seconds or math.inf)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    table = load_table(settings.table) if settings.table else None
    chosen = select_rows(table, settings.rows) if table else ()
    cases = bases(settings.layouts) + table_cases(chosen, settings.layouts)
    pruners = {spelled: read_pruner(spelled) for spelled in settings.methods}
    made = TimedModel.build(settings)
    cases += spelled_cases(pruners, settings.layouts, made.patches, made.depth)
    files = Files(settings.out, settings.new_tokens, _columns(made), table)
    todo = [(size, batch) for size in settings.sizes for batch in settings.batches]
    for i, (size, batch) in enumerate(todo):
        now = time.monotonic()
        results = made.measure(cases, size, batch, now + (end - now) / (len(todo) - i))
        yield files.add(results)
        yield files.remark(made.preparing(size))
        last = batch == settings.batches[-1]
        if settings.largest_batch and made.device.type == "cuda" and last:
            for said in made.largest_batches(results):
                yield files.remark(said)
    yield f"written: {files.named('.csv')}, {files.named('.md')}, a plot per setting"


def _columns(made: TimedModel) -> dict[str, str]:
    return machine.columns(made.device) | {
        "attention": made.settings.attention,
        "graphs": "tower, prefill, decoding" if made.graphs else "",
        "clock": "process" if made.counts_work else "wall",
    }
