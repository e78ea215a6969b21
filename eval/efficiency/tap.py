"""`python -m eval tap`: what choosing tokens costs beside the vision tower it reads from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def tap(
    tiles: Annotated[str, typer.Option(help="Tiles per image, by comma.")] = "1,5",
    rounds: Annotated[int, typer.Option(help="Interleaved rounds after a warm-up.")] = 20,
    device: Annotated[str, typer.Option(help="cuda or cpu; a GPU if there is one.")] = "",
    dtype: Annotated[str, typer.Option(help="float16 on a GPU, float32 on a CPU.")] = "",
    encoder: Annotated[
        str, typer.Option(help="Tower of this shape: a name of --random-weights.")
    ] = "llava-v1.5-7b",
    threads: Annotated[int, typer.Option(help="CPU threads; 0: as torch chooses.")] = 0,
    cpu_time: Annotated[
        bool, typer.Option(help="On a CPU others use too: count own CPU time; with --threads 1.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Stem of the .csv and .md written.")] = Path(
        "results/tap"
    ),
) -> None:
    """Time tap, score and selection of HIVTP against a random tower: no weights needed.

    Three ways in turn: the tower as stock LLaVA calls it; as this library calls it, tapped and one
    layer shorter, with score and selection behind it; and the stock tower asked for its attention
    maps, which is what other implementations do. Then the memory that scoring needs.
    """
    import torch

    from eval.efficiency import integers
    from eval.efficiency.measure import machine
    from eval.efficiency.report import write_csv
    from eval.efficiency.shapes import shape
    from eval.efficiency.towers import TILES, Towers

    if threads:
        torch.set_num_threads(threads)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind = getattr(torch, dtype or ("float16" if place.type == "cuda" else "float32"))
    found = machine(place) | {"dtype": str(kind).removeprefix("torch.")}
    found["clock"] = "process" if cpu_time and place.type == "cpu" else "wall"
    towers = Towers.build(shape(encoder).tower, place, kind, cpu_time)
    table, lines = [], ["; ".join(f"{k} {v}" for k, v in found.items() if v), ""]
    lines += ["| tiles | | time, ms | / stock | peak MB beyond weights | / stock |"]
    lines += ["|--:|---|--:|--:|--:|--:|"]
    for count in integers("tiles", tiles):
        for row in towers.compare(count, rounds):
            table.append({"tiles": count} | row | found)
            lines.append(_line(count, row))
    lines += ["", "| tiles | scratch of scoring, MB | stored queries and keys, MB per tile |"]
    lines += ["|--:|--:|--:|"]
    for count in TILES:
        scratch, stored = towers.scratch(count)
        memory = {"tiles": count, "what": "scoring", "peak_bytes": scratch, "tap_bytes": stored}
        table.append(memory | found)
        lines.append(f"| {count} | {scratch / 1e6:.1f} | {stored / count / 1e6:.2f} |")
    if place.type == "cuda":
        lines += ["", *towers.kernel(rounds)]
    write_csv(out.with_name(out.name + ".csv"), table)
    out.with_name(out.name + ".md").write_text("\n".join(lines) + "\n")
    typer.echo("\n".join(lines))


def _line(tiles: int, row: dict[str, Any]) -> str:
    memory = ["", ""]
    if "peak_bytes" in row:
        memory = [f"{row['peak_bytes'] / 1e6:.1f}", f"{row['peak_ratio']:.3f}"]
    cells = [
        str(tiles),
        row["what"],
        f"{row['ms']:.2f} ({row['ms_q1']:.2f}-{row['ms_q3']:.2f})",
        f"{row['ratio']:.4f} ({row['ratio_q1']:.4f}-{row['ratio_q3']:.4f})",
        *memory,
    ]
    return "| " + " | ".join(cells) + " |"
