"""Closed forms alone, without a run: what pruning can gain on a device, and where that ends."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from eval.efficiency.ideal import Ceilings, RequestSizes, gain_ends, request_seconds
from eval.markdown import pipes
from eval.untrained.shapes import SHAPES, Shape, shape

LONGEST = 2048  # tokens of an answer: nobody asks LLaVA for more
MOST_TILES = 5  # of an AnyRes image
KEEP = 0.25  # share of the tokens


def closed_forms(
    named: str, ceilings: str, batches: Iterable[int], lengths: Sequence[int], text: int
) -> str:
    """The table for one shape, or for all, at ceilings of `TFLOP/s,GB/s` or of a results file."""
    try:
        if ceilings.endswith(".csv"):
            limits, itemsize = measured_ceilings(Path(ceilings))
        else:
            tera, giga = (float(word) for word in ceilings.split(","))
            limits, itemsize = Ceilings(1e12 * tera, 1e9 * giga), 2
    except (ValueError, OSError, StopIteration, KeyError) as error:
        raise ValueError(
            f"ceilings {ceilings}: write TFLOP/s,GB/s or name a .csv of this command; {error}"
        ) from None
    names = [named] if named else [name for name in SHAPES if not name.startswith("tiny")]
    return expected(names, batches, lengths, text, limits, itemsize)


def measured_ceilings(path: Path) -> tuple[Ceilings, int]:
    """What the machine of a results file reached, and the bytes of a number there."""
    with path.open() as file:
        row = next(csv.DictReader(file))
    limits = Ceilings(1e9 * float(row["ceiling_gflops"]), 1e9 * float(row["ceiling_gbytes"]))
    return limits, 4 if row["dtype"] == "float32" else 2


def expected(
    names: Iterable[str],
    batches: Iterable[int],
    new_tokens: Sequence[int],
    text: int,
    limits: Ceilings,
    itemsize: int = 2,
) -> str:
    """What keeping KEEP of the tokens can gain, and where the gain ends."""
    ridge = itemsize * limits.flops / (2 * limits.bytes)
    said = (
        f"Least times in {8 * itemsize} bits at {limits.flops / 1e12:.3g} TFLOP/s and "
        f"{limits.bytes / 1e9:.0f} GB/s, {text} text tokens: TTFT over the unpruned one's, "
        "throughput over the unpruned one's by answer length, and the longest answer whose "
        "throughput still gains a tenth. Where batch times prompt is below "
        f"{ridge:.0f} tokens, prefill waits for the weights and pruning further gains no time."
    )
    heads = ["model", "image tokens", "batch", "TTFT", *(f"{n} new" for n in new_tokens)]
    rows = [[*heads, "gains 1.1 up to"]]
    for name in names:
        for batch in batches:
            rows.append([name, *_gains(shape(name), batch, new_tokens, text, limits, itemsize)])
    return f"{said}\n\n{pipes(rows, left=1)}\n"


def _gains(
    model: Shape,
    batch: int,
    new_tokens: Sequence[int],
    text: int,
    limits: Ceilings,
    itemsize: int,
) -> list[str]:
    tiles = MOST_TILES if model.anyres else 1
    every = tiles * model.tower.patches
    kept = int(every * KEEP)
    full = RequestSizes(batch, tiles, model.tower.layers, every, every + text)
    pruned = RequestSizes(batch, tiles, model.tower.layers - 1, kept, kept + text)
    ours, theirs = (
        [request_seconds(model, request, itemsize, limits, n) for n in (1, *new_tokens)]
        for request in (pruned, full)
    )
    gains = [f"{b / a:.2f}" for a, b in zip(ours[1:], theirs[1:], strict=True)]
    ends = gain_ends(model, full, pruned, itemsize, limits, most=LONGEST)
    last = f"{ends} tokens" if ends < LONGEST else "all"
    return [f"{every} to {kept}", str(batch), f"{ours[0] / theirs[0]:.2f}", *gains, last]
