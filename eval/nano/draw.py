"""Draw small things on cluttered noise, from a seed, with Pillow alone."""

import functools
import math
import random
import string
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from eval.nano.world import (
    BOX_LETTERS,
    CHARACTERS,
    COLORS,
    SHAPES,
    TRAIN_WORDS,
    Picture,
    Thing,
    locate,
)

SIDE = 144  # pixels: the square the embedded model sees
PATCH = 12  # so 12 x 12 patches
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]  # (width, height)
LARGE = ((288, 288), (288, 216), (216, 288), (288, 144), (144, 288))  # canvases of 2 to 4 tiles
_STAGE = 384  # side of the prepared backgrounds, from which pictures are cropped
_SIGN_COLORS = ((20, 20, 20), (30, 40, 90), (90, 20, 20), (240, 240, 235), (20, 80, 40))
_ARROW_COLORS = ((250, 250, 250), (240, 220, 60), (20, 20, 20))
_INK_OTHER = 255


def draw(
    rng: random.Random,
    kind: str,
    size: tuple[int, int] = (SIDE, SIDE),
    *,
    scale: float = 1.0,
    repeat: int | None = None,
    words: tuple[str, ...] = TRAIN_WORDS,
    text: str | None = None,
) -> Picture:
    """Draw a `scene`, `sign`, `diagram`, `dense` (for training) or `blank` picture.

    `repeat` asks a scene for a shape drawn that many times; `text` is what a sign says.
    """
    picture = Picture(background(rng, size), ink=Image.new("L", size))
    pen = Pen(picture, rng, scale)
    pen.clutter()
    if kind == "scene":
        pen.shapes(*_cast(rng, repeat))
    elif kind == "sign":
        pen.sign(text or random_text(rng, words))
        pen.shapes(*_cast(rng, 1, rng.randint(1, 2)))
    elif kind == "diagram":
        pen.diagram()
    elif kind == "dense":
        for _ in range(3):
            pen.sign(random_string(rng))
        pen.shapes(*_cast(rng, rng.randint(1, 3), rng.randint(3, 5)))
    elif kind != "blank":
        raise ValueError(f"unknown kind {kind!r}; choose scene, sign, diagram, dense or blank")
    return picture


def draw_large(rng: random.Random, kind: str, size: tuple[int, int], **options: Any) -> Picture:
    """Draw on a canvas of several tiles; shapes and diagrams are larger, signs are not.

    So the thumbnail shows shapes and arrows, and only the tiles show what a sign says.
    """
    scale = {"scene": 1.4, "diagram": 2.0}.get(kind, 1.0)
    return draw(rng, kind, size, scale=scale, **options)


def large_size(rng: random.Random, kind: str) -> tuple[int, int]:
    """A canvas for the kind of picture: a diagram needs the largest."""
    return LARGE[0] if kind == "diagram" else rng.choice(LARGE)


def random_text(rng: random.Random, words: tuple[str, ...]) -> str:
    """A word or a number."""
    return rng.choice(words) if rng.random() < 0.5 else random_string(rng, string.digits)


def random_string(rng: random.Random, characters: str = CHARACTERS) -> str:
    """Two to four characters."""
    return "".join(rng.choice(characters) for _ in range(rng.randint(2, 4)))


def _cast(
    rng: random.Random, repeat: int | None, total: int | None = None
) -> tuple[list[str], list[str]]:
    """Names and colours of the shapes to draw; the first name comes `repeat` times."""
    repeat = repeat or rng.randint(1, 4)
    total = max(total or rng.randint(2, 5), repeat)
    others = rng.sample(SHAPES, total - repeat + 1)
    names = [others[0]] * repeat + others[1:]
    return names, [rng.choice(list(COLORS)) for _ in names]


class Pen:
    """Draws on a picture and notes what it drew where."""

    def __init__(self, picture: Picture, rng: random.Random, scale: float) -> None:
        self.picture, self.rng, self.scale = picture, rng, scale
        self.width, self.height = picture.image.size
        self.draw = ImageDraw.Draw(picture.image)
        self.ink = ImageDraw.Draw(picture.ink)
        self.taken: list[tuple[float, float, float, float]] = []

    def clutter(self) -> None:
        rng, area = self.rng, self.width * self.height / SIDE**2
        for _ in range(round(rng.randint(8, 20) * area)):
            grey = rng.randint(40, 190)
            color = tuple(grey + rng.randint(-12, 12) for _ in range(3))
            x, y = rng.uniform(0, self.width), rng.uniform(0, self.height)
            if rng.random() < 0.6:
                end = (x + rng.uniform(-26, 26), y + rng.uniform(-26, 26))
                self.draw.line([(x, y), end], fill=color)
            else:
                r = rng.uniform(1, 4)
                self.draw.ellipse([x - r, y - r, x + r, y + r], fill=color)

    def place(self, w: float, h: float) -> tuple[float, float] | None:
        """Find a free spot for a box of half sides w, h; None if the picture is full."""
        for _ in range(60):
            x = self.rng.uniform(w + 2, self.width - w - 2)
            y = self.rng.uniform(h + 2, self.height - h - 2)
            if self.free(x, y, w, h):
                self.taken.append((x, y, w, h))
                return x, y
        return None

    def free(self, x: float, y: float, w: float, h: float) -> bool:
        return all(abs(x - a) > w + c + 3 or abs(y - b) > h + d + 3 for a, b, c, d in self.taken)

    def tint(self, color: str) -> tuple[int, ...]:
        return tuple(min(255, max(0, v + self.rng.randint(-18, 18))) for v in COLORS[color])

    def shapes(self, names: list[str], colors: list[str]) -> None:
        for name, color in zip(names, colors, strict=True):
            r = self.rng.uniform(8, 14) * self.scale
            spot = self.place(r, r)
            if spot is None:
                return
            self.picture.shapes.append(self.thing(name, color, *spot))
            _shape(self.draw, name, *spot, r, self.tint(color))
            _shape(self.ink, name, *spot, r, len(self.picture.shapes))

    def thing(self, name: str, color: str, x: float, y: float, target: str | None = None) -> Thing:
        return Thing(name, color, x, y, *locate(x, y, self.width, self.height), target)

    def sign(self, text: str) -> None:
        """A short text, one character per patch, the way a model of 12 x 12 patches can read it."""
        step = PATCH * self.scale
        w, h = step * len(text) / 2 + 2, 10 * self.scale
        spot = self._sign_spot(w, h, step)
        if spot is None:
            return
        self.picture.sign = text
        left, y = spot
        paper = self.rng.choice(_SIGN_COLORS)
        pen = (250, 250, 250) if sum(paper) < 400 else (10, 10, 10)
        if self.rng.random() < 0.7:
            corners = [left - 3, y - h, left + step * len(text) + 2, y + h - 1]
            self.draw.rectangle(corners, fill=paper)
            self.ink.rectangle(corners, fill=_INK_OTHER)
        else:
            pen = (250, 250, 250)
        face = font(round(self.rng.choice((16, 17, 18)) * self.scale))
        for place, character in enumerate(text):
            x = left + step * (place + 0.5)
            self.draw.text((x, y), character, font=face, fill=pen, anchor="mm")
            self.ink.rectangle([x - 5, y - 6, x + 5, y + 6], fill=_INK_OTHER)
            self.picture.letters.append((character, place, x, y))

    def _sign_spot(self, w: float, h: float, step: float) -> tuple[float, float] | None:
        """Left edge and middle line of a sign, within a quarter patch of the patch grid."""
        for _ in range(60):
            spot = self.place(w, h)
            if spot is None:
                return None
            self.taken.pop()
            shift = self.rng.uniform(-3, 3), self.rng.uniform(-3, 3)
            left = round((spot[0] - w + 2) / step) * step + shift[0]
            y = (round(spot[1] / step - 0.5) + 0.5) * step + shift[1]
            x = left + w - 2
            inside = w <= x <= self.width - w and h <= y <= self.height - h
            if inside and self.free(x, y, w, h):
                self.taken.append((x, y, w, h))
                return left, y
        return None

    def diagram(self) -> None:
        """Four lettered boxes, one per quarter, and a chain of arrows between neighbours."""
        rng, half = self.rng, 13 * self.scale
        corners = [(0.25, 0.25), (0.75, 0.25), (0.75, 0.75), (0.25, 0.75)]
        first, turn, links = rng.randrange(4), rng.choice((1, -1)), rng.choice((2, 3))
        letters = rng.sample(BOX_LETTERS, 4)
        spots = []
        for i in range(4):
            fx, fy = corners[(first + turn * i) % 4]
            wobble = rng.uniform(-7, 7) * self.scale, rng.uniform(-7, 7) * self.scale
            spots.append((fx * self.width + wobble[0], fy * self.height + wobble[1]))
        line = rng.choice(_ARROW_COLORS)
        for start, end in list(zip(spots, spots[1:], strict=False))[:links]:
            self._arrow(start, end, half, line)
        for i, (letter, spot) in enumerate(zip(letters, spots, strict=True)):
            target = letters[i + 1] if i < links else None
            self._box(letter, spot, half, target)

    def _box(self, letter: str, spot: tuple[float, float], half: float, target: str | None) -> None:
        color = self.rng.choice(list(COLORS))
        x, y = spot
        self.picture.boxes.append(self.thing(letter, color, x, y, target))
        square = [x - half, y - half, x + half, y + half]
        self.draw.rectangle(square, fill=self.tint(color), outline=(0, 0, 0))
        self.ink.rectangle(square, fill=len(self.picture.boxes))
        dark = sum(COLORS[color]) < 400
        face = font(round(17 * self.scale))
        pen = (255, 255, 255) if dark else (0, 0, 0)
        self.draw.text((x, y), letter, font=face, fill=pen, anchor="mm")
        self.picture.letters.append((letter, 0, x, y))

    def _arrow(
        self,
        start: tuple[float, float],
        end: tuple[float, float],
        half: float,
        color: tuple[int, int, int],
    ) -> None:
        length = math.dist(start, end)
        ux, uy = (end[0] - start[0]) / length, (end[1] - start[1]) / length
        gap = half + 5 * self.scale
        a = (start[0] + ux * gap, start[1] + uy * gap)
        b = (end[0] - ux * gap, end[1] - uy * gap)
        size = 8 * self.scale
        head = [
            (b[0] + ux * 3, b[1] + uy * 3),
            (b[0] - ux * size - uy * size * 0.8, b[1] - uy * size + ux * size * 0.8),
            (b[0] - ux * size + uy * size * 0.8, b[1] - uy * size - ux * size * 0.8),
        ]
        for draw, fill in ((self.draw, color), (self.ink, _INK_OTHER)):
            draw.line([a, b], fill=fill, width=max(2, round(3 * self.scale)))
            draw.polygon(head, fill=fill)


def _shape(
    draw: ImageDraw.ImageDraw, name: str, x: float, y: float, r: float, fill: object
) -> None:
    box = [x - r, y - r, x + r, y + r]
    if name == "circle":
        draw.ellipse(box, fill=fill)
    elif name == "ring":
        draw.ellipse(box, outline=fill, width=max(2, round(r * 0.4)))
    else:
        draw.polygon([(x + r * px, y + r * py) for px, py in _outline(name)], fill=fill)


@functools.cache
def _outline(name: str) -> tuple[tuple[float, float], ...]:
    """Corners of a shape of radius 1 around the origin, y down."""
    if name == "square":
        return ((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85))
    if name == "triangle":
        return ((0, -1), (1, 0.85), (-1, 0.85))
    if name == "diamond":
        return ((0, -1.1), (0.8, 0), (0, 1.1), (-0.8, 0))
    if name == "cross":
        a = 0.36
        quarter = ((-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a))
        return quarter + tuple((-px, -py) for px, py in quarter)
    if name == "star":
        turns = [(i * math.pi / 5, 0.45 if i % 2 else 1.15) for i in range(10)]
        return tuple((r * math.sin(t), -r * math.cos(t)) for t, r in turns)
    turns = [i * math.pi / 12 for i in range(24)]
    return tuple(
        (
            math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16,
        )
        for t in turns
    )


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """The typeface that Pillow carries, so that pictures look alike everywhere."""
    return ImageFont.load_default(size=size)


def background(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    """Soft blotches under fine grain, cropped from a prepared stage."""
    width, height = size
    stage, grain = rng.choice(_stages()), _grain()
    crops = []
    for source in (stage, grain):
        x, y = rng.randint(0, _STAGE - width), rng.randint(0, _STAGE - height)
        crop = source[y : y + height, x : x + width]
        crops.append(crop[:, ::-1] if rng.random() < 0.5 else crop)
    pixels = crops[0] + crops[1] * rng.uniform(3, 10) + rng.uniform(-20, 20)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


@functools.cache
def _stages() -> list[np.ndarray]:
    """Blotchy backgrounds, the same in every run: (384, 384, 3) float32 each."""
    rng, stages = np.random.RandomState(0), []
    for _ in range(40):
        stage = np.full((_STAGE, _STAGE, 3), rng.uniform(50, 150), np.float32)
        for cell, strength in ((48, 25), (18, 18), (9, 12)):
            cells = _STAGE // cell + 2
            noise = rng.randn(cells, cells, 1) + rng.randn(cells, cells, 3) * 0.3
            stage += _blow_up((noise * strength).astype(np.float32))
        stages.append(stage)
    return stages


def _blow_up(noise: np.ndarray) -> np.ndarray:
    channels = [
        Image.fromarray(noise[..., c]).resize((_STAGE, _STAGE), Image.Resampling.BICUBIC)
        for c in range(3)
    ]
    return np.stack([np.asarray(c) for c in channels], -1)


@functools.cache
def _grain() -> np.ndarray:
    return np.random.RandomState(1).randn(_STAGE, _STAGE, 1).astype(np.float32)
