"""All figures of one model: which methods are drawn on which images, and into which files."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eval.figures.flips import WITH, WITHOUT, answer_all, find_flips
from eval.figures.look import cropped_to, look
from eval.figures.panels import draw_comparisons, draw_heat, draw_methods
from eval.figures.questions import ImageQuestion
from eval.figures.schematic import draw_schematic
from eval.plan.names import display_name
from eval.report.picture import Picture, save
from eval.results.store import write_json_atomic
from llava_hivtp.answer import prompt_ids
from llava_hivtp.pruners import (
    PRUNERS,
    LayerPruner,
    Pruner,
    build_pruner,
    find_pruner,
    for_depth,
    read_pruner,
)

# r_max in percent -> k and c of HIVTP in the paper's Table 1, and k of the same budget without c.
BLOCKS = {75: (50, 2, 75), 50: (25, 2, 50), 40: (15, 2, 39), 25: (14, 3, 25)}


class Methods:
    """The methods that are drawn, at one budget.

    Args:
        block: r_max in percent, one of BLOCKS.
        own: further methods as `read_pruner` takes them; a share they leave open is the block's.

    Raises:
        ValueError: for another block, or a further method that cannot be built or drawn.
    """

    def __init__(self, block: int, own: Iterable[str] = ()) -> None:
        if block not in BLOCKS:
            raise ValueError(f"--block must be one of {list(BLOCKS)}, got {block}")
        self.block = block
        self.own = dict(self._read(text) for text in own)
        for title, method in self.own.items():
            if isinstance(method, LayerPruner):
                raise ValueError(
                    f"{title} chooses inside the language model, which no figure shows: name its "
                    "encoder method"
                )

    def stages(self, depth: int) -> dict[str, Pruner]:
        """HIVTP with and without its local stage, and the further ones."""
        k, c, alone = BLOCKS[self.block]
        found = {
            WITH: build_pruner("hivtp", k=k, c=c),
            WITHOUT: build_pruner("hivtp", k=alone, c=None),
        }
        return _fitting(found | self.own, depth)

    def every(self, depth: int) -> dict[str, Pruner]:
        """Every registered method, HIVTP first, and the further ones."""
        k, c, _ = BLOCKS[self.block]
        found = {display_name("hivtp"): build_pruner("hivtp", k=k, c=c)}
        for name in PRUNERS:
            if name not in ("none", "hivtp"):
                found[display_name(name)] = build_pruner(name, keep=self.block / 100)
        return _fitting(found | self.own, depth)

    def _read(self, text: str) -> tuple[str, Pruner]:
        if "=" in text:
            name, _, arguments = text.rpartition(":")
            return f"{display_name(name)} ({arguments})", read_pruner(text)
        has_share = "keep" in (field.name for field in fields(find_pruner(text)))
        share = {"keep": self.block / 100} if has_share else {}
        return display_name(text), build_pruner(text, **share)


def _fitting(pruners: dict[str, Pruner], depth: int) -> dict[str, Pruner]:
    return {title: for_depth(pruner, depth) for title, pruner in pruners.items()}


def make_figures(
    model: Any, tokenizer: Any, asked: Sequence[ImageQuestion], methods: Methods, out: Path
) -> None:
    """The method, heat maps, kept tokens with answers, and every method side by side."""
    for one in asked:
        _say_what_is_cropped(model, one)
    _save(draw_schematic(), out / "method", "Figure 1, the method")
    depth = model.tower_of(model).layers
    pruners = methods.stages(depth)
    looks = [look(model, one.image, range(1, depth + 1), pruners[WITH]) for one in asked]
    heat = draw_heat(looks, scored=pruners[WITH].layers)
    _save(heat, out / "heat", "Figures 2 and 4-9, importance in every encoder layer")
    compared = [answer_all(model, tokenizer, one, pruners) for one in asked]
    words = "Figures 3 and 10-13, kept tokens and answers"
    _save(draw_comparisons(compared), out / "stages", words)
    image, prompt = asked[0].image, prompt_ids(model, tokenizer, asked[0].prompt)
    every = methods.every(depth)
    looks = {name: look(model, image, pruner=one, prompt=prompt) for name, one in every.items()}
    _save(draw_methods(image, looks), out / "methods", f"every method at {methods.block} %")


def make_flips(
    model: Any,
    tokenizer: Any,
    asked: Iterable[ImageQuestion],
    methods: Methods,
    out: Path,
    keep: int,
) -> None:
    """Count the answers that the local stage decides; draw the first `keep` it sets right."""
    pruners = methods.stages(model.tower_of(model).layers)
    found = find_flips(model, tokenizer, tqdm(asked), pruners, keep)
    write_json_atomic(out / "flips.json", found.summary())
    print(json.dumps(found.summary(), indent=1))
    print(out / "flips.json")
    if found.samples:
        words = "Figure 3, answered right only with the local stage"
        _save(draw_comparisons(found.samples), out / "flips", words)


def _say_what_is_cropped(model: Any, asked: ImageQuestion) -> None:
    size = asked.image.size
    if (left := cropped_to(model, size)) is not None:
        sides = "{} x {} of {} x {}".format(*left, *size)
        print(f"note: the model sees the middle {sides} pixels of an image", file=sys.stderr)


def _save(figure: Picture, stem: Path, what: str) -> None:
    save(figure, stem)
    print(f"{stem}.png, .pdf: {what}")
