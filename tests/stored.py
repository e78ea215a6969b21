"""Results as an evaluation stores them, made up for the tests of what reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.plan.table import Row, Table
from eval.plan.units import unit_path
from eval.results import store
from eval.results.identity import sources_digest
from eval.results.stale import method_file

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
        {"doc_id": i, "answer": answer, "score": right, "group": i}
        for i, (right, answer) in enumerate(zip(rights, answers, strict=True))
    ]
    store.write_jsonl_atomic(store.beside(path, "samples.jsonl"), samples)
    result = {
        "unit": {"row": row.id, "task": task},
        "score": 100 * sum(rights) / len(rights) if score is None else score,
        "metrics": {},
        "requests": len(rights),
        "tokens": {"patches": patches, "newlines": newlines, "total": 576, "generated": 4},
        "protocol": {**PROTOCOL, **(protocol or {})},
        "provenance": {**PROVENANCE, **(provenance or {})},
        "seconds": 1.0,
        "source": sources_digest(method_file(row.pruner)),
    }
    store.write_json_atomic(path, result)
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
    timing = {
        "requests": 100,
        "warmup": 5,
        "ttft_ms": ttft_ms,
        "throughput": throughput,
        "samples": [],
        "protocol": {**PROTOCOL, "batch": 1, **(protocol or {})},
        "provenance": {**PROVENANCE, "device": device},
        "source": sources_digest(method_file(row.pruner)),
    }
    path = unit_path(out, table.model, row, task)
    store.write_json_atomic(store.beside(path, "timing.json"), timing)
