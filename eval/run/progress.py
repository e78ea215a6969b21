"""How far something is: a bar on a terminal, a line with the time left now and then in a log."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from tqdm import tqdm

MOVING, PLAIN = 0.5, 30.0  # seconds between two looks of a bar, and between two lines of a log


class Progress(tqdm):
    """Counts what is finished; use as a context, with `update(n)`."""

    def __init__(
        self,
        label: str,
        total: int,
        done: int = 0,
        unit: str = "request",
        stream: TextIO | None = None,
    ) -> None:
        """Start at `done`, which earlier runs had finished."""
        stream = stream or sys.__stderr__  # lmms-eval's bars are silenced on sys.stderr
        self._moves = stream.isatty()
        super().__init__(
            desc=label,
            total=total,
            initial=done,
            unit=f" {unit}s",
            file=stream,
            disable=False,  # whatever TQDM_DISABLE says to lmms-eval's bars
            mininterval=MOVING if self._moves else PLAIN,
            maxinterval=2 * PLAIN,
            miniters=1,
        )

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        """Move the bar, or add a line."""
        if self._moves:
            return super().display(msg, pos)
        fresh, left = self.n - self.initial, self.total - self.n
        gone = self.format_dict["elapsed"]
        words = [f"{self.desc}: {self.n}/{self.total}"]
        if not fresh and self.initial:
            words.append(f"{self.initial} of them from before")
        elif fresh:
            words.append(f"{gone / fresh:.3g} s each")
            words += [f"{duration(left * gone / fresh)} left"] if left else []
        self.fp.write(", ".join(words) + "\n")
        return True


def duration(seconds: float) -> str:
    """`42 s`, `7 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
