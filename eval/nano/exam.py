"""Questions for the family of towers, and which patches each question is about.

They are drawn as the stand-ins of the paper's eight data sets are, from other seeds, and harder
ones. All are asked in one pass without lmms-eval, so that many methods can be compared in minutes:
an answer is right if every token of it is the model's first choice. MMBench's questions are asked
in one turn of the four.
"""

import re
from dataclasses import dataclass

import numpy as np

from eval.nano.draw import PATCH
from eval.nano.harder import HARDER, ask_harder
from eval.nano.labels import GRID
from eval.nano.paper_sets import PAPER_SETS
from eval.nano.questions import Question
from eval.nano.studio import Studio
from eval.nano.text import Encoded, encode, prompts
from eval.nano.world import Picture

EIGHT = tuple(make.__name__ for make in PAPER_SETS)
SEEDS = {"tune": 5100, "report": 7100}  # methods are chosen on the first, reported on the second
_COVER = 12  # pixels of a thing that make a patch belong to it, of 144


@dataclass(frozen=True)
class Item:
    """One question of an exam."""

    set: str
    picture: Picture
    question: Question

    def encoded(self) -> Encoded:
        """The question as its set asks it, and the answer to compare with."""
        wordings = prompts(self.question, hinted=True)
        return encode(self.question, wordings[-1 if self.set == "mmbench" else 0], 0.0)

    def patches(self) -> np.ndarray:
        """Which patches hold what the question names, (N,) bool."""
        named = [i for i, thing in enumerate(self.picture.shapes) if self._names(thing)]
        ink = np.asarray(self.picture.ink).reshape(GRID, PATCH, GRID, PATCH)
        if self.picture.boxes:
            named = range(len(self.picture.boxes))  # the other boxes are the options
        elif self.question.family == "reading":
            return self._letters()
        found = np.zeros((GRID, GRID), bool)
        for i in named:
            found |= (ink == i + 1).sum((1, 3)) >= _COVER
        return found.ravel()

    def _names(self, thing: object) -> bool:
        said = set(re.findall(r"[a-z]+", self.question.text))
        shapes = {thing.name, thing.name + "s", thing.name + "es"}
        return bool(said & shapes) or thing.color in said

    def _letters(self) -> np.ndarray:
        found = np.zeros((GRID, GRID), bool)
        for _, _, x, y in self.picture.letters:
            found[min(GRID - 1, int(y // PATCH)), min(GRID - 1, int(x // PATCH))] = True
        return found.ravel()


def draw_exam(seeds: str, number: int) -> list[Item]:
    """`number` questions, about, of each of the eight sets and of each kind of harder picture."""
    if seeds not in SEEDS:
        raise ValueError(f"seeds must be one of {', '.join(SEEDS)}, got {seeds!r}")
    items = []
    for i, make in enumerate(PAPER_SETS):
        studio = Studio(SEEDS[seeds] + i)
        make(studio, 4 * number if make.__name__ == "mmbench" else number)
        items += [Item(make.__name__, *pair) for pair in studio.asked]
    for name in HARDER:
        items += [Item(name, *pair) for pair in ask_harder(name, SEEDS[seeds], number)]
    return items
