"""What each part of `cover` is worth on the towers: what is asked of the language model, budgets.

Two other methods are asked plainly and with all that the language model can be asked for.

The value of `reach` that gives a mean is found on pictures of the tuning seeds, tower by tower.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from eval.machine import commit, device_name, version
from eval.nano import CHECKPOINTS
from eval.nano.exam import Item, draw_exam
from eval.nano.frontier import BUDGETS, CHUNK, OURS, Model, answer, build_rows, tokens_of
from eval.nano.frontier_report import PARTS, STARRED, TOWERS, Tower, correct, lead_line
from eval.results import store
from eval.results.means import Difference, difference, mean
from eval.run.reach import find_reach
from llava_hivtp import build_pruner
from llava_hivtp.pruners import for_depth
from llava_hivtp.pruners.base import Pruner

CAP = 0.5  # of the patches, at most, where a picture decides
PLACED, MERGED, BOTH = "kept positions", "merged and weighed", "both"
FREE = "budget per picture"
VARIANTS = (PLACED, MERGED, BOTH, FREE)
PEERS = ("hivtp", "divprune")


@dataclass(frozen=True)
class Reach:
    """Of one budget: the value, and the mean tokens of the tuning pictures."""

    value: float
    reached: float


def row_of(variant: str, percent: int, method: str = OURS) -> str:
    """The name of a row."""
    return f"{method}, {variant}-{percent}"


def find_reaches(folder: Path, number: int, file: Path) -> dict[int, Reach]:
    """By budget in percent: the `reach` of its tokens on average, on pictures of other seeds."""
    if file.is_file():
        return {int(p): Reach(**found) for p, found in json.loads(file.read_text()).items()}
    model, items = Model(folder), draw_exam("tune", number)
    pruner, above = for_depth(build_pruner(OURS, keep=CAP), model.depth), []
    for start in range(0, len(items), CHUNK):
        seen = model.see([item.picture.image for item in items[start : start + CHUNK]])
        with torch.no_grad():
            needed = pruner.needed_above(seen)
        above += [tile[tile < torch.inf].tolist() for tile in needed]
    found = {p: Reach(*find_reach(above, patches)) for p, patches in BUDGETS.items()}
    store.write_json_atomic(file, {p: vars(reach) for p, reach in found.items()})
    return found


def build_ablation(reaches: Mapping[int, Reach]) -> dict[str, Pruner]:
    """Row -> method. Rows that differ in positions alone have the same one."""
    every, rows = build_rows(), {}
    for percent in BUDGETS:
        ours = every[f"{OURS}-{percent}"]
        merged = replace(ours, merge=True, weigh=True)
        rows |= {f"{name}-{percent}": every[f"{name}-{percent}"] for name in (OURS, *PEERS)}
        rows[row_of(PLACED, percent)] = ours
        rows[row_of(MERGED, percent)] = rows[row_of(BOTH, percent)] = merged
        free = replace(ours, keep=CAP, reach=reaches[percent].value)
        rows[row_of(FREE, percent)] = free
        for name in PEERS:
            peer = replace(every[f"{name}-{percent}"], merge=True, weigh=True)
            rows[row_of(BOTH, percent, name)] = peer
    return rows


@dataclass(frozen=True)
class Ablated(Tower):
    """A tower, and the budgets it was given."""

    reaches: Mapping[int, Reach]


def ablate(out: Path, number: int, towers: Sequence[str]) -> list[Ablated]:
    """Ask every tower all questions under every variant; what `out` holds is not asked again."""
    if unknown := [name for name in towers if not (CHECKPOINTS / name).is_dir()]:
        raise ValueError(f"no such tower: {', '.join(unknown)}; choose from {', '.join(TOWERS)}")
    items, found = draw_exam("report", number), []
    placed = {row_of(PLACED, p) for p in BUDGETS}
    placed |= {row_of(BOTH, p, name) for name in (OURS, *PEERS) for p in BUDGETS}
    for name in towers:
        folder = CHECKPOINTS / name
        reaches = find_reaches(folder, number, out / f"{name}-{number}.reach.json")
        rows = build_ablation(reaches)
        right = answer(folder, items, rows, out / f"{name}-{number}.jsonl", placed)
        found.append(Ablated(name, [], items, right, reaches))
    return found


def report(towers: Sequence[Ablated]) -> str:
    """Scores, what every variant adds, leads over the others under the same, and the budgets."""
    leads = _leads(towers)
    made = f"torch {version('torch')}, transformers {version('transformers')}, commit {commit()}"
    lines = [
        f"{device_name()}, one thread, shared with other work; {made}. Intervals and tests pair "
        "the questions, clustered by picture; p-values are corrected (Holm) over the "
        f"{len(leads)} comparisons of this page.",
        "",
        f"`{OURS}` keeps the budget of every picture and asks nothing else of the language model. "
        f"{PLACED.capitalize()}: `positions=kept`. {MERGED.capitalize()}: `merge=True, "
        f"weigh=True`. {FREE.capitalize()}: `reach`, at most {CAP:.0%} of a picture, with the "
        "value that gives the budget on average on pictures of the tuning seeds.",
    ]
    for part in PARTS:
        for tower in towers:
            lines += ["", f"## {tower.name}, {part}", "", *_table(tower, part, leads)]
    return "\n".join([*lines, "", *_budgets(towers), ""])


_Key = tuple[str, str, str, int]  # tower, part, variant or other method, percent


def _leads(towers: Sequence[Ablated]) -> dict[_Key, tuple[Difference, float]]:
    """What each variant adds, the leads under the same, each with the corrected p-value."""
    found = {}
    for tower in towers:
        for part in PARTS:
            for percent in BUDGETS:
                plain = tower.scored(f"{OURS}-{percent}", part)
                for variant in VARIANTS:
                    row = tower.scored(row_of(variant, percent), part)
                    found[tower.name, part, variant, percent] = difference(row, plain)
                best = tower.scored(row_of(BOTH, percent), part)
                for name in PEERS:
                    row = tower.scored(row_of(BOTH, percent, name), part)
                    found[tower.name, part, name, percent] = difference(best, row)
    return correct(found)


def _table(tower: Ablated, part: str, leads: Mapping[_Key, tuple]) -> list[str]:
    lines = ["| | " + " | ".join(f"{p} %" for p in BUDGETS) + " |"]
    lines.append("|---|" + "---:|" * len(BUDGETS))
    for method in (*PEERS, OURS):
        cells = [f"{mean(tower.scored(f'{method}-{p}', part)).value:.1f}" for p in BUDGETS]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    said = {variant: f"{variant}, minus {OURS}" for variant in VARIANTS}
    said |= {name: f"{OURS}, {BOTH}, minus {name}, {BOTH}" for name in PEERS}
    lines += [lead_line(tower, part, row, leads, what) for row, what in said.items()]
    return [*lines, "", STARRED]


def _budgets(towers: Sequence[Ablated]) -> list[str]:
    lines = ["## Budgets per picture", ""]
    lines += ["| tower | budget | reach | mean, tuning pictures | mean, these | fewest | most |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for tower in towers:
        for percent, patches in BUDGETS.items():
            counts, reach = tower.right[tokens_of(row_of(FREE, percent))], tower.reaches[percent]
            cells = (
                patches, f"{reach.value:g}", f"{reach.reached:.1f}",
                f"{sum(counts) / len(counts):.1f}", min(counts), max(counts),
            )  # fmt: skip
            lines.append(f"| {tower.name} | {' | '.join(map(str, cells))} |")
    return lines


def things_in(item: Item) -> int:
    """Shapes, boxes and characters drawn in a picture."""
    return len(item.picture.shapes) + len(item.picture.boxes) + len(item.picture.letters)
