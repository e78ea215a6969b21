"""What every patch of a drawn picture shows: the supervision of the vision tower."""

from dataclasses import dataclass

import numpy as np

from eval.nano.draw import PATCH, SIDE
from eval.nano.questions import CONTINUED
from eval.nano.world import CHARACTERS, COLORS, NUMBERS, ORDINALS, SHAPES, Picture

GRID = SIDE // PATCH
IGNORE = -1
# What can be said of a patch: the words that say it. Label 0 is "none of these".
ASPECTS: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "color": tuple(COLORS),
    "character": (*CHARACTERS, *(CONTINUED + c for c in CHARACTERS)),
    "place": ORDINALS,  # of a character in its text
    "side": ("left", "right"),
    "height": ("top", "bottom"),
    "number": NUMBERS,  # how many shapes of this name the picture holds
    "target": tuple(CONTINUED + c for c in CHARACTERS),  # where the arrow of this box points
}
EVERYWHERE = ("shape", "color", "character")  # these also learn to say "none" of the background
_INDEX = {aspect: {word: i for i, word in enumerate(words)} for aspect, words in ASPECTS.items()}
_COVER = 24  # pixels of a thing that make a patch show it, of 144


@dataclass(frozen=True)
class Labels:
    """One picture: a class per aspect and patch, which patches hold ink, what the whole holds."""

    aspects: dict[str, np.ndarray]  # (N,) int64; IGNORE where the aspect does not apply
    ink: np.ndarray  # (N,) bool
    contents: np.ndarray  # (SUMMARY,) float32, 0 or 1


SUMMARY = len(SHAPES) + len(COLORS) + len(SHAPES) * len(COLORS) + len(CHARACTERS)


def label(picture: Picture) -> Labels:
    """Label the patches of a picture of the model's own size."""
    ink = np.asarray(picture.ink).reshape(GRID, PATCH, GRID, PATCH)
    aspects = {
        a: np.full((GRID, GRID), 0 if a in EVERYWHERE else IGNORE, np.int64) for a in ASPECTS
    }

    def mark(where: object, **said: str | None) -> None:
        for aspect, word in said.items():
            aspects[aspect][where] = 0 if word is None else 1 + _INDEX[aspect][word]

    for things in (picture.shapes, picture.boxes):
        for i, thing in enumerate(things):
            where = (ink == i + 1).sum((1, 3)) >= _COVER
            mark(where, color=thing.color, side=thing.side, height=thing.height)
            if things is picture.shapes:
                number = NUMBERS[min(len(picture.named(thing.name)), len(NUMBERS)) - 1]
                mark(where, shape=thing.name, number=number)
    targets = {box.name: box.target for box in picture.boxes}
    for character, place, x, y in picture.letters:
        where = (min(GRID - 1, int(y // PATCH)), min(GRID - 1, int(x // PATCH)))
        mark(where, character=(CONTINUED if place else "") + character)
        if character in targets:
            target = targets[character]
            mark(where, target=target and CONTINUED + target)
        else:
            mark(where, place=ORDINALS[place])
    flat = {a: v.reshape(-1) for a, v in aspects.items()}
    return Labels(flat, (ink > 0).any((1, 3)).reshape(-1), _contents(picture))


def _contents(picture: Picture) -> np.ndarray:
    """Which shapes, colours, pairs of both and characters the picture holds."""
    held = np.zeros(SUMMARY, np.float32)
    s, c = len(SHAPES), len(COLORS)
    for thing in picture.shapes:
        shape, color = _INDEX["shape"][thing.name], _INDEX["color"][thing.color]
        held[[shape, s + color, s + c + shape * c + color]] = 1
    for character, *_ in picture.letters:
        held[s + c + s * c + CHARACTERS.index(character)] = 1
    return held
