"""How far a unit is: a line that moves on a terminal, plain lines with the time left elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

MOVING, PLAIN = 0.5, 30.0  # seconds between two lines


class Progress:
    """Counts requests; use as a context."""

    def __init__(self, label: str, total: int, done: int = 0, stream: TextIO | None = None) -> None:
        """Start at `done`, which earlier runs had finished."""
        self.label, self.total, self.done, self.first = label, total, done, done
        self.stream = stream or sys.__stderr__  # lmms-eval's bars are silenced on sys.stderr
        self.moves = self.stream.isatty()
        self.started = self.shown = time.monotonic()

    def __enter__(self) -> Progress:
        self._show()
        return self

    def __exit__(self, *_: object) -> None:
        self._show()
        if self.moves:
            self.stream.write("\n")

    def update(self, count: int) -> None:
        """Count requests as finished."""
        self.done += count
        if time.monotonic() - self.shown >= (MOVING if self.moves else PLAIN):
            self._show()

    def _show(self) -> None:
        self.shown = time.monotonic()
        width = 24 * self.done // max(self.total, 1)
        bar = f" |{'#' * width}{'.' * (24 - width)}|" if self.moves else ""
        line = f"{self.label}:{bar} {self.done}/{self.total}{self._left()}"
        self.stream.write(f"\r{line}\x1b[K" if self.moves else f"{line}\n")
        self.stream.flush()

    def _left(self) -> str:
        fresh = self.done - self.first
        if not fresh:
            return f", {self.first} of them from before" if self.first else ""
        per_request = (self.shown - self.started) / fresh
        left = duration((self.total - self.done) * per_request)
        return f", {per_request:.3g} s each" + (f", {left} left" if self.done < self.total else "")


def duration(seconds: float) -> str:
    """`42 s`, `7 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
