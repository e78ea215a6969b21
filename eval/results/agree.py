"""Whether results may stand together: in one table, or a new one beside those that are there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

BATCH = "batch size"
Protocol = Mapping[str, Any]  # entries; those under "task" hold for one task only


class MixedResults(ValueError):
    """Results that must not stand in one table."""


def agreed(kind: str, found: Mapping[str, Mapping[str, Protocol]]) -> dict[str, str]:
    """The entries that the protocols of all rows share, given by row and task.

    In float32 the batch may differ, which flips no answer (eval/measured/batch-flips.md): then all
    batches are named. In half precision it may not, unless every row left it to the memory.

    Raises:
        MixedResults: with every entry in which they differ, and the rows.
    """
    protocols = [(r, task, each) for r, tasks in found.items() for task, each in tasks.items()]
    shared = {name for *_, protocol in protocols for name in protocol} - {"task"}
    seen: dict[str, dict[str, list[str]]] = {}  # entry -> value -> rows
    for row, task, protocol in protocols:
        entries = {name: protocol.get(name, "not recorded") for name in shared}
        entries |= {f"{task} {name}": value for name, value in protocol.get("task", {}).items()}
        for name, value in entries.items():
            seen.setdefault(name, {}).setdefault(text_of(value), []).append(row)
    free = {BATCH} if set(seen.get("dtype", ())) == {"float32"} else set()
    differing = {
        n: values for n, values in sorted(seen.items()) if len(values) > 1 and n not in free
    }
    if differing:
        lines = [
            f"  {name}: " + "; ".join(f"{value} ({_some(rows)})" for value, rows in values.items())
            for name, values in differing.items()
        ]
        raise MixedResults(
            f"{kind} results were measured under different protocols. Choose rows that agree with "
            "--rows, or another --out, or run the odd rows again:\n" + "\n".join(lines)
        )
    return {
        name: ", ".join(sorted(values, key=_by_number)) for name, values in sorted(seen.items())
    }


def _by_number(value: str) -> tuple[int, str]:
    return len(value), value


def text_of(value: object) -> str:
    """An entry of a protocol or a provenance, to compare and to print."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _some(rows: Sequence[str]) -> str:
    names = list(dict.fromkeys(rows))
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
