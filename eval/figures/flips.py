"""Which questions the local stage decides, and how wide the empty squares are that it fills."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from eval.figures.look import DROPPED, look
from eval.figures.panels import Comparison
from eval.figures.questions import ImageQuestion
from eval.figures.square import widest_square
from llava_hivtp.answer import answer, prompt_ids
from llava_hivtp.pruners import Pruner

WITH, WITHOUT = "with local stage", "without"


@dataclass
class Flips:
    """Counts over a data set, and the first questions that only the local stage gets right."""

    questions: int = 0
    right: dict[str, int] = field(default_factory=dict)  # pruner -> right answers
    sides: dict[str, int] = field(default_factory=dict)  # pruner -> of widest empty squares, sum
    rescued: int = 0  # wrong without the local stage, right with it
    lost: int = 0  # the reverse
    samples: list[Comparison] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Accuracies, mean widest empty squares and flips, as numbers."""
        of = max(1, self.questions)
        return {
            "questions": self.questions,
            "accuracy": {name: round(100 * n / of, 2) for name, n in self.right.items()},
            "mean_widest_empty_square": {name: round(n / of, 2) for name, n in self.sides.items()},
            "only_right_with_local_stage": self.rescued,
            "only_right_without": self.lost,
        }


def find_flips(
    model: Any,
    tokenizer: Any,
    asked: Iterable[ImageQuestion],
    pruners: Mapping[str, Pruner],
    keep: int,
) -> Flips:
    """Answer every question unpruned, WITH and WITHOUT; keep the first `keep` that flip.

    Of an AnyRes image the squares are those of its tiles put together.
    """
    flips = Flips()
    for one in asked:
        sample = answer_all(model, tokenizer, one, pruners)
        right = {name: sample.is_right(name) for name in sample.answers}
        flips.questions += 1
        for name, is_so in right.items():
            flips.right[name] = flips.right.get(name, 0) + is_so
        for name, seen in sample.looks.items():
            stages = seen.laid(seen.sheets[-1])
            side = widest_square(stages == DROPPED).side
            flips.sides[name] = flips.sides.get(name, 0) + side
        flips.lost += right[WITHOUT] and not right[WITH]
        if right[WITH] and not right[WITHOUT]:
            flips.rescued += 1
            if len(flips.samples) < keep:
                flips.samples.append(sample)
    return flips


def answer_all(
    model: Any, tokenizer: Any, asked: ImageQuestion, pruners: Mapping[str, Pruner]
) -> Comparison:
    """The unpruned model's answer to one question, and those under the pruners with their looks."""
    before, answers, looks = model.pruner, {}, {}
    prompt = prompt_ids(model, tokenizer, asked.prompt)
    try:
        for name, pruner in {"unpruned": Pruner(), **pruners}.items():
            model.pruner = pruner
            answers[name] = answer(model, tokenizer, asked.image, asked.prompt)
            if name in pruners:
                looks[name] = look(model, asked.image, prompt=prompt)
    finally:
        model.pruner = before
    return Comparison(asked, answers, looks)
