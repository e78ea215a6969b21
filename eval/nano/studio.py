"""Draws the pictures of the data sets, one after the other, each to suit its question."""

import random
from dataclasses import dataclass
from typing import Any

from PIL import Image

from eval.nano import questions as q
from eval.nano.draw import draw, draw_large, large_size
from eval.nano.world import TEST_WORDS, Picture

Row = dict[str, Any]


@dataclass(frozen=True)
class Split:
    """One parquet file: where it lies, and the rows in it."""

    repository: str
    config: str
    split: str
    rows: list[Row]


class Studio:
    """Draws pictures one after the other, small or large, or nothing but background."""

    def __init__(self, seed: int, images: str = "small", blank: bool = False) -> None:
        if images not in ("small", "large"):
            raise ValueError(f"images must be small or large, got {images!r}")
        self.rng, self.images, self.blank = random.Random(seed), images, blank
        self.asked: list[tuple[Picture, q.Question]] = []  # in order

    def picture(self, kind: str, **options: Any) -> Picture:
        """Draw a picture of the next seed."""
        if self.images == "small":
            return draw(self.rng, kind, words=TEST_WORDS, **options)
        size = large_size(self.rng, kind)
        return draw_large(self.rng, kind, size, words=TEST_WORDS, **options)

    def image(self, picture: Picture) -> Image.Image:
        if not self.blank:
            return picture.image
        # A generator of its own: the pictures that follow must not change.
        return draw(random.Random(0), "blank", picture.image.size).image

    def ask(
        self, kind: str, family: q.Family, want: q.Want = None, **options: Any
    ) -> tuple[Picture, q.Question]:
        """Draw until the picture suits the question."""
        while True:
            picture = self.picture(kind, **options)
            question = family(self.rng, picture, want)
            if question:
                self.asked.append((picture, question))
                return picture, question

    def counted(self) -> dict[str, int]:
        return {"repeat": self.rng.randint(1, 4)}
