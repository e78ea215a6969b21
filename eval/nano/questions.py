"""Questions about drawn pictures, balanced so that none can be answered blind.

A question is written with *hints*: `circle[red|left]` means that a model which has read as far as
`circle` should already have looked up those facts. Training uses them; nothing else sees them.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from eval.nano.world import (
    BOX_LETTERS,
    COLORS,
    NUMBERS,
    SHAPES,
    TRAIN_WORDS,
    Picture,
    Thing,
    plural,
)

CONTINUED = "##"  # how the tokenizer spells a character that follows another
_HINT = re.compile(r"\[([^\]]*)\]")


@dataclass(frozen=True)
class Question:
    """One question; `hinted` and `hinted_options` carry the hints, the properties do not."""

    family: str
    hinted: str
    answer: str
    hinted_options: tuple[str, ...] = ()
    context: str = ""

    @property
    def text(self) -> str:
        return plain(self.hinted)

    @property
    def options(self) -> tuple[str, ...]:
        return tuple(plain(option) for option in self.hinted_options)


def plain(text: str) -> str:
    """Drop the hints."""
    return _HINT.sub("", text)


def split_hints(text: str) -> list[tuple[str, tuple[str, ...]]]:
    """Cut into pieces, each followed by the facts its last word should recall."""
    pieces, start = [], 0
    for match in _HINT.finditer(text):
        facts = tuple(fact for fact in match.group(1).split("|") if fact)
        pieces.append((text[start : match.start()], facts))
        start = match.end()
    return [*pieces, (text[start:], ())]


Want = bool | None  # the answer a yes/no question should have; None leaves it to the picture
Family = Callable[[random.Random, Picture, Want], Question | None]  # None: it cannot be asked here


def exists(rng: random.Random, picture: Picture, want: Want = None) -> Question | None:
    """Is there a circle?"""
    want = _coin(rng, want)
    pool = [s for s in SHAPES if bool(picture.named(s)) == want]
    return pool and _exists(picture, None, rng.choice(pool), want)


def exists_color(rng: random.Random, picture: Picture, want: Want = None) -> Question | None:
    """Is there a red circle? The colour, at least, is there."""
    want = _coin(rng, want)
    colors = sorted({t.color for t in picture.shapes})
    pairs = [(c, s) for c in colors for s in SHAPES]
    pool = [p for p in pairs if _has(picture, *p) == want]
    if not want:
        pool = [(c, s) for c, s in pool if not picture.named(s)]
    return pool and _exists(picture, *rng.choice(pool), want)


def exists_pair(rng: random.Random, picture: Picture, want: Want = None) -> Question | None:
    """Is there a red circle? Something is red and something is a circle."""
    want = _coin(rng, want)
    colors, names = ({getattr(t, k) for t in picture.shapes} for k in ("color", "name"))
    pool = [(c, s) for c in colors for s in names if _has(picture, c, s) == want]
    return pool and _exists(picture, *rng.choice(sorted(pool)), want)


def _exists(picture: Picture, color: str | None, shape: str, want: bool) -> Question:
    article = "an" if color == "orange" else "a"
    if color is None:
        thing = f"{shape}{_facts(picture.named(shape))}"
    else:
        both = [t for t in picture.named(shape) if t.color == color]
        thing = f"{color}{_facts(picture.colored(color), 'color')} {shape}[{_yes(bool(both))}]"
    return Question("existence", f"Is there {article} {thing} in the image?", _yes(want))


def count(rng: random.Random, picture: Picture, want: Want = None) -> Question | None:
    """Are there two circles? Asked numbers are as often right as wrong."""
    want = _coin(rng, want)
    true, shape = _counted(rng, picture)
    if true is None:
        return None
    asked = true if want else rng.choice([k for k in (1, 2, 3, 4) if k != true])
    hint = f"[{NUMBERS[true - 1]}]"
    if asked == 1:
        text = f"Is there only one {shape}{hint} in the image?"
    else:
        text = f"Are there {NUMBERS[asked - 1]} {plural(shape)}{hint} in the image?"
    return Question("count", text, _yes(want))


def how_many(rng: random.Random, picture: Picture, want: Want = None) -> Question | None:
    """How many circles are there? One to four."""
    true, shape = _counted(rng, picture)
    if true is None:
        return None
    number = NUMBERS[true - 1]
    text = f"How many {plural(shape)}[{number}] are there in the image?"
    return _choice(rng, "count", text, number, NUMBERS)


def _counted(rng: random.Random, picture: Picture) -> tuple[int | None, str]:
    """The shape drawn most often: one to four times alike, so that no number is the usual one."""
    if not picture.shapes:
        return None, ""
    numbers = {name: len(picture.named(name)) for name in sorted({t.name for t in picture.shapes})}
    most = max(numbers.values())
    return most, rng.choice([name for name, number in numbers.items() if number == most])


def color_is(rng: random.Random, picture: Picture, want: Want = None) -> Question | None:
    """Is the circle red?"""
    thing = _pick(rng, picture.single())
    if thing is None:
        return None
    want = _coin(rng, want)
    asked = thing.color if want else _other(rng, thing.color, picture)
    text = f"Is the {thing.name}{_facts([thing])} {asked}[{_yes(want)}]?"
    return Question("color", text, _yes(want))


def side_is(rng: random.Random, picture: Picture, want: Want = None) -> Question | None:
    """Is the circle on the left side? Is it at the top?"""
    thing = _pick(rng, [t for t in picture.single() if t.side and t.height])
    if thing is None:
        return None
    want = _coin(rng, want)
    true, names = rng.choice(((thing.side, ("left", "right")), (thing.height, ("top", "bottom"))))
    asked = true if want else names[names[0] == true]
    where = f"on the {asked}[{_yes(want)}] side"
    if names[0] == "top":
        where = f"at the {asked}[{_yes(want)}]"
    text = f"Is the {thing.name}{_facts([thing])} {where} of the image?"
    return Question("position", text, _yes(want))


def relation_is(rng: random.Random, picture: Picture, want: Want = None) -> Question | None:
    """Is the circle above the square? They lie in opposite halves."""
    want = _coin(rng, want)
    pair = _opposite(rng, picture)
    if pair is None:
        return None
    first, second, axis = pair
    true = _RELATIONS[getattr(first, axis)]
    asked = true if want else _RELATIONS[getattr(second, axis)]
    relation = f"{asked}[{_yes(want)}]"
    text = f"Is the {first.name}{_facts([first])} {relation} the {second.name}{_facts([second])}?"
    return Question("relation", text, _yes(want))


_RELATIONS = {"left": "left of", "right": "right of", "top": "above", "bottom": "below"}


def color_of(rng: random.Random, picture: Picture, want: Want = None) -> Question | None:
    """What color is the circle?"""
    thing = _pick(rng, picture.single())
    return thing and Question(
        "color", f"What color is the {thing.name}{_facts([thing])}?", thing.color
    )


def shape_of(rng: random.Random, picture: Picture, want: Want = None) -> Question | None:
    """What shape is the red object?"""
    thing = _pick(rng, [t for t in picture.shapes if len(picture.colored(t.color)) == 1])
    return thing and Question(
        "shape", f"What shape is the {thing.color}{_facts([thing], 'color')} object?", thing.name
    )


def side_of(rng: random.Random, picture: Picture, want: Want = None) -> Question | None:
    """On which side of the image is the circle?"""
    thing = _pick(rng, [t for t in picture.single() if t.side])
    return thing and Question(
        "position",
        f"On which side of the image is the {thing.name}{_facts([thing])}?",
        thing.side,
    )


def relation_of(rng: random.Random, picture: Picture, want: Want = None) -> Question | None:
    """Is the circle to the left or to the right of the square?"""
    pair = _opposite(rng, picture, "side")
    if pair is None:
        return None
    first, second, _ = pair
    text = (
        f"Is the {first.name}{_facts([first])} to the left or to the right "
        f"of the {second.name}{_facts([second])}?"
    )
    return Question("relation", text, first.side)


def color_choice(rng: random.Random, picture: Picture, want: Want = None) -> Question | None:
    question = color_of(rng, picture)
    return question and _choice(rng, "color", question.hinted, question.answer, tuple(COLORS))


def shape_choice(rng: random.Random, picture: Picture, want: Want = None) -> Question | None:
    question = shape_of(rng, picture)
    return question and _choice(rng, "shape", question.hinted, question.answer, SHAPES)


def where_choice(rng: random.Random, picture: Picture, want: Want = None) -> Question | None:
    """Where is the circle? One of four corners."""
    thing = _pick(rng, [t for t in picture.single() if t.side and t.height])
    if thing is None:
        return None
    corners = tuple(f"{h} {s}" for h in ("top", "bottom") for s in ("left", "right"))
    answer = f"{thing.height} {thing.side}"
    text = f"Where is the {thing.name}{_facts([thing])}?"
    return _choice(rng, "position", text, answer, corners)


def present_choice(rng: random.Random, picture: Picture, want: Want = None) -> Question | None:
    """Which of these is in the picture? One shape is."""
    there = sorted({t.name for t in picture.shapes})
    absent = [s for s in SHAPES if s not in there]
    if not there or len(absent) < 3:
        return None
    text = "Which of these objects is in the picture?"
    return _choice(rng, "existence", text, rng.choice(there), tuple(absent))


def float_choice(rng: random.Random, picture: Picture, want: Want = None) -> Question | None:
    """Which object floats? A rule to apply to what is seen, as in a science book."""
    verb, half = rng.choice((("floats", "top"), ("sinks", "bottom")))
    right = _pick(rng, [t for t in picture.single() if t.height == half])
    wrong = [t.name for t in picture.single() if t.height and t.height != half]
    if right is None or not wrong:
        return None
    context = "Objects at the top of the picture float. Objects at the bottom sink."
    text = f"Which object {verb}[{half}]?"
    return _choice(rng, "rule", text, right.name, (rng.choice(wrong),), context)


def arrow_choice(rng: random.Random, picture: Picture, want: Want = None) -> Question | None:
    """What does the arrow from E point to?"""
    box = _pick(rng, [b for b in picture.boxes if b.target])
    if box is None:
        return None
    text = f"What does the arrow from {box.name}{_facts([box])} point to?"
    inside = [b.name for b in picture.boxes if b.name not in (box.name, box.target)]
    outside = rng.choice([c for c in BOX_LETTERS if c not in [b.name for b in picture.boxes]])
    return _choice(rng, "arrow", text, box.target, (*inside, outside))


def letter_choice(rng: random.Random, picture: Picture, want: Want = None) -> Question | None:
    """Which letter is at the top left?"""
    box = _pick(rng, picture.boxes)
    if box is None:
        return None
    others = tuple(b.name for b in picture.boxes if b is not box)
    text = f"Which letter is at the {box.height} {box.side}[{box.name}]?"
    return _choice(rng, "position", text, box.name, others)


def box_color_choice(rng: random.Random, picture: Picture, want: Want = None) -> Question | None:
    """What color is box E?"""
    box = _pick(rng, picture.boxes)
    text = box and f"What color is box {box.name}{_facts([box])}?"
    return box and _choice(rng, "color", text, box.color, tuple(COLORS))


def box_choice(rng: random.Random, picture: Picture, want: Want = None) -> Question | None:
    """Which box is red?"""
    colors = [b.color for b in picture.boxes]
    box = _pick(rng, [b for b in picture.boxes if colors.count(b.color) == 1])
    if box is None:
        return None
    others = tuple(b.name for b in picture.boxes if b is not box)
    return _choice(rng, "color", f"Which box is {box.color}[{box.name}]?", box.name, others)


def read(rng: random.Random, picture: Picture, want: Want = None) -> Question | None:
    """What does the sign say?"""
    if picture.sign is None:
        return None
    text = rng.choice(("What does the sign say?", "What is written on the sign?"))
    return Question("reading", text, picture.sign)


def read_bare(rng: random.Random, picture: Picture, want: Want = None) -> Question | None:
    return picture.sign and Question("reading", "what is written in the image?", picture.sign)


def word_is(
    rng: random.Random,
    picture: Picture,
    want: Want = None,
    words: tuple[str, ...] = TRAIN_WORDS,
) -> Question | None:
    """Is the word on the sign "CAT"? The other words differ in their first letter."""
    if picture.sign is None or not picture.sign.isalpha():
        return None
    want = _coin(rng, want)
    others = [w for w in words if w[0] != picture.sign[0]]
    asked = picture.sign if want else rng.choice(others)
    return Question("reading", f'Is the word on the sign "{asked}[{_yes(want)}]"?', _yes(want))


FAMILIES: dict[str, dict[Family, float]] = {
    "scene": {
        exists: 2, exists_color: 1, exists_pair: 2, count: 2, how_many: 1, color_is: 2,
        side_is: 2, relation_is: 2, color_of: 2, shape_of: 2, side_of: 2, relation_of: 2,
        color_choice: 2, shape_choice: 2, where_choice: 2, present_choice: 2, float_choice: 2,
    },
    "sign": {read: 3, read_bare: 3, word_is: 2, exists: 1, color_of: 1},
    "diagram": {arrow_choice: 2, letter_choice: 2, box_color_choice: 2, box_choice: 2},
}  # fmt: skip
EASY = (exists, exists_pair, color_of, shape_of, color_is, side_of)  # looked up in one step


def ask(
    rng: random.Random, picture: Picture, kind: str, number: int, easy: bool = False
) -> list[Question]:
    """Ask up to `number` different questions that suit the kind of picture."""
    families = FAMILIES[kind]
    if easy:
        families = {f: w for f, w in families.items() if f in EASY or kind != "scene"}
    drawn = rng.choices(list(families), list(families.values()), k=3 * number)
    questions: dict[tuple[str, tuple[str, ...]], Question] = {}
    for family in drawn:
        question = family(rng, picture, None)
        if question:
            questions.setdefault((question.text, question.options), question)
        if len(questions) == number:
            break
    return list(questions.values())


def rotate(question: Question, turns: int) -> Question:
    """The same question with its options moved on by `turns` places."""
    options = list(question.options)
    answer = options["ABCD".index(question.answer)]
    turned = options[turns:] + options[:turns]
    return _lettered(question.family, question.hinted, answer, turned, question.context)


def _choice(
    rng: random.Random,
    family: str,
    text: str,
    answer: str,
    pool: tuple[str, ...],
    context: str = "",
) -> Question:
    others = sorted(set(pool) - {answer})
    options = [answer, *rng.sample(others, min(3, len(others)))]
    rng.shuffle(options)
    return _lettered(family, text, answer, options, context)


def _lettered(family: str, text: str, answer: str, options: list[str], context: str) -> Question:
    """Give each option the hint a reader needs: its own letter if it is right, else No."""
    letter = "ABCD"[options.index(answer)]
    hinted = tuple(f"{o}[{letter if o == answer else 'No'}]" for o in options)
    return Question(family, text, letter, hinted, context)


def _facts(things: list[Thing], known: str = "name") -> str:
    """What a reader should recall who knows a thing by its name or its color, as a hint."""
    if not things:
        return "[No]"
    if len(things) > 1:
        return f"[{NUMBERS[min(len(things), 4) - 1]}]"
    (thing,) = things
    facts = [thing.color if known == "name" else thing.name, thing.side, thing.height]
    if thing.target:
        facts.append(CONTINUED + thing.target)
    return f"[{'|'.join(f for f in facts if f)}]"


def _opposite(
    rng: random.Random, picture: Picture, axis: str | None = None
) -> tuple[Thing, Thing, str] | None:
    """Two shapes in opposite halves of the picture, and the axis that parts them."""
    axis = axis or rng.choice(("side", "height"))
    located = [t for t in picture.single() if getattr(t, axis)]
    first = _pick(rng, located)
    second = first and _pick(rng, [t for t in located if getattr(t, axis) != getattr(first, axis)])
    return (first, second, axis) if second else None


def _has(picture: Picture, color: str, shape: str) -> bool:
    return any(t.color == color for t in picture.named(shape))


def _other(rng: random.Random, color: str, picture: Picture) -> str:
    """A wrong colour: half the time one that something else in the picture has."""
    near = sorted({t.color for t in picture.shapes} - {color})
    pool = near if near and rng.random() < 0.5 else [c for c in COLORS if c != color]
    return rng.choice(pool)


def _pick(rng: random.Random, things: list[Thing]) -> Thing | None:
    return rng.choice(things) if things else None


def _coin(rng: random.Random, want: Want) -> bool:
    return rng.random() < 0.5 if want is None else want


def _yes(value: bool) -> str:
    return "Yes" if value else "No"
