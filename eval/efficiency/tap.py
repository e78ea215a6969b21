"""What choosing tokens costs beside the vision tower it reads from."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from eval import machine
from eval.efficiency.device import chosen
from eval.efficiency.report import write_csv
from eval.efficiency.towers import TILES, Towers
from eval.markdown import pipes
from eval.untrained.shapes import shape


def tap(
    encoder: str,
    tiles: Iterable[int],
    rounds: int,
    device: str,
    dtype: str,
    cpu_time: bool,
    out: Path,
) -> str:
    """Measure a random tower of a shape's encoder, write the .csv and .md; returns the latter."""
    place, kind = chosen(device, dtype)
    found = machine.columns(place) | {"dtype": str(kind).removeprefix("torch.")}
    found["clock"] = "process" if cpu_time and place.type == "cpu" else "wall"
    towers = Towers.build(shape(encoder).tower, place, kind, cpu_time)
    times = [{"tiles": n} | row for n in tiles for row in towers.compare(n, rounds)]
    memory = [_scoring(towers, n) for n in TILES]
    warnings = sorted({row["warnings"] for row in times} - {""})
    parts = [
        "; ".join(f"{name} {value}" for name, value in found.items() if value),
        *(f"WARNING: {warning}." for warning in warnings),
        pipes([_TIMES, *map(_time_cells, times)], left=2),
        pipes([_MEMORY, *map(_memory_cells, memory)], left=0),
    ]
    if place.type == "cuda":
        parts.append(towers.kernel(rounds))
    write_csv(out.with_name(out.name + ".csv"), [row | found for row in (*times, *memory)])
    text = "\n\n".join(parts) + "\n"
    out.with_name(out.name + ".md").write_text(text)
    return text


_TIMES = ["tiles", "what", "time, ms", "/ stock", "peak MB beyond weights", "/ stock"]
_MEMORY = ["tiles", "scratch of scoring, MB", "stored queries and keys, MB per tile"]


def _scoring(towers: Towers, tiles: int) -> dict[str, Any]:
    scratch, stored = towers.scratch(tiles)
    return {"tiles": tiles, "what": "scoring", "peak_bytes": scratch, "tap_bytes": stored}


def _time_cells(row: dict[str, Any]) -> list[str]:
    memory = ["", ""]
    if "peak_bytes" in row:
        memory = [f"{row['peak_bytes'] / 1e6:.1f}", f"{row['peak_ratio']:.3f}"]
    return [
        str(row["tiles"]),
        row["what"],
        f"{row['ms']:.2f} ({row['ms_q1']:.2f}-{row['ms_q3']:.2f})",
        f"{row['ratio']:.4f} ({row['ratio_q1']:.4f}-{row['ratio_q3']:.4f})",
        *memory,
    ]


def _memory_cells(row: dict[str, Any]) -> list[str]:
    per_tile = row["tap_bytes"] / row["tiles"]
    return [str(row["tiles"]), f"{row['peak_bytes'] / 1e6:.1f}", f"{per_tile / 1e6:.2f}"]
