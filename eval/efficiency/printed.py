"""The paper's own times, as ratios to its unpruned row."""

from __future__ import annotations

from dataclasses import dataclass

from eval.plan.table import Table


@dataclass(frozen=True)
class Printed:
    """A row of the paper over its unpruned row."""

    id: str
    tokens: float
    ttft: float
    throughput: float


def printed_ratios(table: Table | None) -> list[Printed]:
    """HIVTP's printed rows, where the table prints times."""
    columns = ("tokens", "ttft_ms", "throughput")
    base = table.unpruned if table else None
    if base is None or not set(columns) <= base.printed.keys():
        return []
    return [
        Printed(row.id, *(float(row.printed[name] / base.printed[name]) for name in columns))
        for row in table.rows
        if row.pruner == "hivtp" and set(columns) <= row.printed.keys()
    ]
