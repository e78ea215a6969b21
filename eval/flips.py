"""Which questions the local stage decides, and how large the holes are that it fills."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from eval.look import ask, largest_hole
from eval.plates import Sample, is_right
from eval.samples import Asked
from llava_hivtp.pruners import Pruner

WITH, WITHOUT = "with local stage", "without"


@dataclass
class Flips:
    """Counts over a data set, and the first questions that only the local stage gets right."""

    questions: int = 0
    right: dict[str, int] = field(default_factory=dict)  # pruner -> right answers
    holes: dict[str, int] = field(default_factory=dict)  # pruner -> patches in largest holes, sum
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
            "only_right_with_local_stage": self.rescued,
            "only_right_without": self.lost,
        }


def find_flips(
    model: Any,
    tokenizer: Any,
    asked: Iterable[Asked],
    pruners: dict[str, Pruner],
    keep: int,
) -> Flips:
    """Answer every question unpruned, WITH and WITHOUT; keep the first `keep` that flip.

    The hole of an AnyRes image is that of all its sheets together.
    """
    flips = Flips()
    for one in asked:
        answers = answer_all(model, tokenizer, one.image, one.prompt, pruners)
        full = answers.pop("unpruned")
        sample = Sample(one.image, one.question, one.gold, full, answers)
        right = {name: is_right(answer.text, one.gold) for name, answer in answers.items()}
        right["unpruned"] = is_right(full.text, one.gold)
        flips.questions += 1
        for name, is_so in right.items():
            flips.right[name] = flips.right.get(name, 0) + is_so
        for name, answer in answers.items():
            size = sum(int(largest_hole(answer.look.laid(s)).sum()) for s in answer.look.sheets)
            flips.holes[name] = flips.holes.get(name, 0) + size
        flips.lost += right[WITHOUT] and not right[WITH]
        if right[WITH] and not right[WITHOUT]:
            flips.rescued += 1
            if len(flips.samples) < keep:
                flips.samples.append(sample)
    return flips


def answer_all(
    model: Any, tokenizer: Any, image: Image.Image, prompt: str, pruners: dict[str, Pruner]
) -> dict[str, Any]:
    """The unpruned model's answer and one under every pruner, by name."""
    answers = {}
    before = model.pruner
    try:
        for name, pruner in {"unpruned": Pruner(), **pruners}.items():
            model.pruner = pruner
            answers[name] = ask(model, tokenizer, image, prompt)
    finally:
        model.pruner = before
    return answers
