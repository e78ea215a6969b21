"""Which questions the local stage decides, and how large the holes are that it fills."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from eval.figures.look import largest_hole, look, widest_hole
from eval.figures.panels import Sample
from eval.figures.samples import Asked
from llava_hivtp.answer import answer
from llava_hivtp.pruners import Pruner

WITH, WITHOUT = "with local stage", "without"


@dataclass
class Flips:
    """Counts over a data set, and the first questions that only the local stage gets right."""

    questions: int = 0
    right: dict[str, int] = field(default_factory=dict)  # pruner -> right answers
    holes: dict[str, int] = field(default_factory=dict)  # pruner -> patches in largest holes, sum
    squares: dict[str, int] = field(default_factory=dict)  # pruner -> sides of empty squares, sum
    rescued: int = 0  # wrong without the local stage, right with it
    lost: int = 0  # the reverse
    samples: list[Sample] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Accuracies, mean largest holes and flips, as numbers."""
        of = max(1, self.questions)
        return {
            "questions": self.questions,
            "accuracy": {name: round(100 * n / of, 2) for name, n in self.right.items()},
            "mean_largest_hole": {name: round(n / of, 2) for name, n in self.holes.items()},
            "mean_empty_square": {name: round(n / of, 2) for name, n in self.squares.items()},
            "only_right_with_local_stage": self.rescued,
            "only_right_without": self.lost,
        }


def find_flips(
    model: Any,
    tokenizer: Any,
    asked: Iterable[Asked],
    pruners: Mapping[str, Pruner],
    keep: int,
) -> Flips:
    """Answer every question unpruned, WITH and WITHOUT; keep the first `keep` that flip.

    Of an AnyRes image the holes are those of its tiles put together.
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
            flips.holes[name] = flips.holes.get(name, 0) + int(largest_hole(stages).sum())
            flips.squares[name] = flips.squares.get(name, 0) + widest_hole(stages)
        flips.lost += right[WITHOUT] and not right[WITH]
        if right[WITH] and not right[WITHOUT]:
            flips.rescued += 1
            if len(flips.samples) < keep:
                flips.samples.append(sample)
    return flips


def answer_all(model: Any, tokenizer: Any, asked: Asked, pruners: Mapping[str, Pruner]) -> Sample:
    """The unpruned model's answer to one question, and those under the pruners with their looks."""
    before, answers, looks = model.pruner, {}, {}
    try:
        for name, pruner in {"unpruned": Pruner(), **pruners}.items():
            model.pruner = pruner
            answers[name] = answer(model, tokenizer, asked.image, asked.prompt)
            if name in pruners:
                looks[name] = look(model, asked.image)
    finally:
        model.pruner = before
    return Sample(asked, answers, looks)
