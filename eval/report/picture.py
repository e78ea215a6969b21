"""What every figure of the project has: a canvas that shows itself, colours, whole files."""

from __future__ import annotations

import io
import os
from pathlib import Path

from matplotlib.figure import Figure

DPI = 150
# Okabe and Ito's colours, which colour-blind eyes tell apart.
GREEN, RED, BLUE = (0, 158, 115), (213, 94, 0), (0, 114, 178)
PURPLE, YELLOW = (204, 121, 167), (240, 228, 66)


class Picture(Figure):
    """A figure that shows itself in a notebook, whatever the backend."""

    def _repr_png_(self) -> bytes:
        return self.png()

    def png(self, dpi: int = DPI) -> bytes:
        """The figure as a PNG file."""
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=dpi)
        return file.getvalue()


def save(figure: Picture, stem: Path) -> None:
    """Write `stem`.png and `stem`.pdf, each under a temporary name first."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    for kind in ("png", "pdf"):
        path = stem.with_name(f"{stem.name}.{kind}")
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            figure.savefig(unfinished, format=kind)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
