"""Results as an evaluation stores them, made up for the tests of what reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.plan.table import Row, Table
from eval.plan.units import unit_path
from eval.results import records
from eval.results.records import Result, Sample, Timing, Tokens
from eval.results.sources import Code

PROTOCOL = {"dtype": "float16", "lmms_eval": "0.7.3", "task": {"version": 1}}
PROVENANCE = {
    "commit": "abc1234",
    "versions": {"torch": "2.13.0"},
    "device": "NVIDIA A40",
    "date": "2026-11-20T10:00:00",
}


def store_result(
    out: Path,
    table: Table,
    row: Row,
    task: str,
    rights: Sequence[float],
    *,
    score: float | None = None,
    patches: float = 288,
    newlines: float = 0,
    protocol: dict[str, Any] | None = None,
    provenance: dict[str, Any] | None = None,
    answers: Sequence[str] | None = None,
    limit: int | None = None,
) -> Path:
    """One unit whose documents are right or wrong; each document is a group of its own."""
    path = unit_path(out, table.model, row, task, limit)
    answers = ["yes" if right else "no" for right in rights] if answers is None else answers
    samples = [
        Sample(doc_id=i, answer=answer, score=right, group=str(i))
        for i, (right, answer) in enumerate(zip(rights, answers, strict=True))
    ]
    result = Result(
        unit={"row": row.id, "task": task},
        score=100 * sum(rights) / len(rights) if score is None else score,
        metrics={},
        requests=len(rights),
        tokens=Tokens(patches=patches, newlines=newlines, total=576, generated=4),
        protocol={**PROTOCOL, **(protocol or {})},
        provenance={**PROVENANCE, **(provenance or {})},
        seconds=1.0,
        source=Code().of(row, "llava_hivtp.model"),
        samples=records.write_samples(path, samples),
    )
    records.write_result(path, result)
    return path


def store_timing(
    out: Path,
    table: Table,
    row: Row,
    task: str,
    ttft_ms: float,
    throughput: float,
    device: str = "NVIDIA A40",
    protocol: dict[str, Any] | None = None,
) -> None:
    """The timing pass of a unit."""
    timing = Timing(
        requests=100,
        warmup=5,
        ttft_ms=ttft_ms,
        throughput=throughput,
        samples=[],
        protocol={**PROTOCOL, "batch": 1, **(protocol or {})},
        provenance={**PROVENANCE, "device": device},
        source=Code().of(row, "llava_hivtp.model"),
    )
    records.write_timing(unit_path(out, table.model, row, task), timing)
