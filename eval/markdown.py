"""Tables as aligned Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def pipes(rows: Sequence[Sequence[str]], left: int) -> str:
    """A pipe table that reads well as it is; the first row is the heading.

    The first `left` columns stand left, the others right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    padded = [
        [word.ljust(w) if i < left else word.rjust(w) for i, (word, w) in enumerate(pairs)]
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in [padded[0], rule, *padded[1:]])
