"""How large and how thin an image may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LEAST = 4  # pixels a side is stretched to; below, processors take it for the colour channels


@dataclass(frozen=True)
class Limits:
    """Beyond these, preparing an image takes minutes and gigabytes.

    LLaVA-v1.5 pads an image to a square: a thin strip costs as many pixels as its longer side
    squared. So the longer side caps the pixels, whatever the shape.
    """

    side: int = 16_384  # most pixels along the longer side
    aspect: float = 200  # most that one side may be longer than the other

    def __post_init__(self) -> None:
        if type(self.side) is not int or self.side < 1:
            raise ValueError(f"side must be a whole number from 1, got {self.side!r}")
        number = isinstance(self.aspect, (int, float)) and not isinstance(self.aspect, bool)
        if not number or not self.aspect >= 1:
            raise ValueError(f"aspect must be a number from 1, got {self.aspect!r}")

    @classmethod
    def read(cls, side: int | str, aspect: float | str) -> Limits:
        """Limits whose numbers may be spelled as text: 16384, "16384", "2.5"."""
        return cls(_number(side, int), _number(aspect, float))

    def check(self, size: tuple[int, int], name: str) -> None:
        """Raise a ValueError naming the image and the limit it breaks."""
        long, short = max(size), min(size)
        shape = f"{name} is {size[0]} x {size[1]} pixels"
        if not short:
            raise ValueError(f"{shape}: there is nothing to see")
        if long > self.side:
            raise ValueError(f"{shape}; at most {self.side} a side are taken (Limits.side)")
        if long > self.aspect * max(short, LEAST):
            raise ValueError(
                f"{shape}; one side may be {self.aspect:g} times the other (Limits.aspect)"
            )


def _number(value: Any, kind: type) -> Any:
    """The number that a text spells; any other text as it is, for `Limits` to refuse."""
    try:
        return kind(value) if isinstance(value, str) else value
    except ValueError:
        return value
