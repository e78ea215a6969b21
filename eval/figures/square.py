"""The widest empty square: how large a part of an image can be and still go unseen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Square:
    """A square of patches; the side is 0 if there is none."""

    top: int
    left: int
    side: int


def widest_square(empty: np.ndarray) -> Square:
    """The widest square of cells that all hold, the first of equals in reading order.

    Args:
        empty: (rows, columns) bool.
    """
    sides = np.zeros((empty.shape[0] + 1, empty.shape[1] + 1), int)  # of squares ending here
    for row, column in np.argwhere(empty):
        ends = sides[row, column], sides[row, column + 1], sides[row + 1, column]
        sides[row + 1, column + 1] = 1 + min(ends)
    side = int(sides.max())
    bottom, right = np.unravel_index(sides.argmax(), sides.shape)
    return Square(int(bottom) - side, int(right) - side, side)
