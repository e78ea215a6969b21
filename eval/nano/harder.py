"""Pictures on which choosing tokens is harder; training never shows their like."""

import random
from collections.abc import Callable
from itertools import cycle, islice

from PIL import Image

from eval.nano import questions as q
from eval.nano.draw import SIDE, Pen, background
from eval.nano.world import COLORS, SHAPES, TEST_WORDS, Picture

Asked = list[tuple[Picture, q.Question]]


class _EdgePen(Pen):
    """Puts everything at an edge of the picture, two pixels off."""

    def place(self, w: float, h: float) -> tuple[float, float] | None:
        for _ in range(60):
            x, y = self.rng.uniform(w + 2, SIDE - w - 2), self.rng.uniform(h + 2, SIDE - h - 2)
            edges = ((w + 2, y), (SIDE - w - 2, y), (x, h + 2), (x, SIDE - h - 2))
            x, y = self.rng.choice(edges)
            if self.free(x, y, w, h):
                self.taken.append((x, y, w, h))
                return x, y
        return None


class _CornerPen(Pen):
    """Puts two things into opposite corners."""

    def place(self, w: float, h: float) -> tuple[float, float] | None:
        if self.taken:
            x, y = (SIDE - at for at in self.taken[0][:2])
        else:
            x, y = self.rng.choice((w + 4, SIDE - w - 4)), self.rng.choice((h + 4, SIDE - h - 4))
        self.taken.append((x, y, w, h))
        return x, y


def _start(rng: random.Random, kind: type[Pen] = Pen) -> Pen:
    size = (SIDE, SIDE)
    pen = kind(Picture(background(rng, size), ink=Image.new("L", size)), rng, 1.0)
    pen.clutter()
    return pen


def _cast(rng: random.Random, number: int) -> tuple[list[str], list[str]]:
    return rng.sample(SHAPES, number), rng.sample(list(COLORS), number)


def border(rng: random.Random) -> Picture:
    """Two to four things, all at the border."""
    pen = _start(rng, _EdgePen)
    pen.shapes(*_cast(rng, rng.randint(2, 4)))
    return pen.picture


def apart(rng: random.Random) -> Picture:
    """Two things in opposite corners."""
    pen = _start(rng, _CornerPen)
    pen.shapes(*_cast(rng, 2))
    return pen.picture


def cluttered(rng: random.Random) -> Picture:
    """Two things among thirty strokes as bright as they are."""
    pen = _start(rng)
    for _ in range(30):
        x, y = rng.uniform(0, SIDE), rng.uniform(0, SIDE)
        end = x + rng.uniform(-18, 18), y + rng.uniform(-18, 18)
        pen.draw.line([(x, y), end], fill=pen.tint(rng.choice(list(COLORS))), width=2)
    pen.shapes(*_cast(rng, 2))
    return pen.picture


def beside(rng: random.Random) -> Picture:
    """A sign among four or five things."""
    pen = _start(rng)
    pen.sign(rng.choice(TEST_WORDS))
    pen.shapes(*_cast(rng, rng.randint(4, 5)))
    return pen.picture


HARDER: dict[str, tuple[Callable[[random.Random], Picture], tuple[q.Family, ...]]] = {
    "border": (border, (q.color_of, q.shape_of, q.exists_pair)),
    "apart": (apart, (q.relation_of, q.color_of, q.shape_of)),
    "clutter": (cluttered, (q.color_of, q.shape_of, q.exists_pair)),
    "beside": (beside, (q.read,)),
}


def ask_harder(name: str, seed: int, number: int) -> Asked:
    """So many questions about pictures of this kind."""
    draw, families = HARDER[name]
    rng, asked = random.Random(f"{name} {seed}"), []
    for family in islice(cycle(families), number):
        question = None
        while not question:
            picture = draw(rng)
            question = family(rng, picture, None)
        asked.append((picture, question))
    return asked
