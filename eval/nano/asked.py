"""The quick sets asked outside a table: every answer of a row, stored once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval import machine

if TYPE_CHECKING:
    from eval.plan.table import Row
    from llava_hivtp.lmms import LlavaHIVTP

    Found = tuple[str, float, int]  # answer, score, kept patches


def ask(
    lm: LlavaHIVTP, row: Row, tasks: Sequence[str], data: Path, limit: int | None, file: Path
) -> None:
    """Answer all questions under a row's method and write them to a file, whole or not at all.

    Args:
        lm: the loaded model; keeps the row's method.
        row: of a table.
        tasks: of lmms-eval.
        data: folder that `eval.nano.datasets.write` filled.
        limit: questions of each task; None for all.
        file: JSON with the answers by task and the commit.
    """
    from eval.run import harness

    lm.model.pruner = row.build()
    found: dict[str, list[Found]] = {}
    for task in tasks:
        results = harness.evaluate(lm, harness.load_task(task, data), limit)
        samples = harness.samples(results, task, lm.answers)
        found[task] = [(sample.answer, sample.score, sample.patches) for sample in samples]
    written = file.with_suffix(".tmp")
    written.write_text(json.dumps({"tasks": found, "commit": machine.commit()}))
    written.rename(file)


def answers(file: Path) -> dict[str, Any]:
    """What `ask` wrote: `tasks` to (answer, score, kept patches) of all questions; `commit`."""
    return json.loads(file.read_text())
