"""Tables as aligned Markdown and as LaTeX."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from eval.markdown import pipes

MISSING = "-"
_TEX = {"%": r"\%", "_": r"\_", "&": r"\&", "±": r"$\pm$", "Δ": r"$\Delta$", "<": "$<$"}


@dataclass(frozen=True)
class Cell:
    """A number of a table, and what hangs on it."""

    text: str = MISSING
    extra: str = ""  # an interval, or the tasks behind a mean that lacks some
    best: bool = False


@dataclass(frozen=True)
class Line:
    """One line of a table; the names are shown once where lines follow each other."""

    section: str
    method: str
    source: str  # ours, paper or Δ
    cells: list[Cell]


def markdown(headings: Sequence[str], lines: Sequence[Line], width: int = 0) -> str:
    """Lines as a pipe table; as several, one below the other, where one is wider than `width`."""
    body = [[*names, *map(_markdown, line.cells)] for names, line in _named(lines)]
    rows = [["block", "method", "", *headings], *body]
    whole = pipes(rows, left=3)
    if not width or len(whole.partition("\n")[0]) <= width:
        return whole
    widths = [max(map(len, column)) + 3 for column in zip(*rows, strict=True)]
    parts: list[list[int]] = []
    for column in range(3, len(widths)):
        used = sum(widths[:3]) + 1 + sum(widths[c] for c in parts[-1]) if parts else 0
        if not parts or used + widths[column] > width:
            parts.append([])
        parts[-1].append(column)
    return "\n\n".join(
        pipes([row[:3] + [row[column] for column in part] for row in rows], left=3)
        for part in parts
    )


def latex(headings: Sequence[str], lines: Sequence[Line]) -> str:
    """A booktabs tabular."""
    rows = [
        rf"\begin{{tabular}}{{lll{'r' * len(headings)}}}",
        r"\toprule",
        _ampersands(["block", "method", "", *headings], []),
    ]
    for names, line in _named(lines):
        rows += [r"\midrule"] if names[0] else []
        rows.append(_ampersands(names, line.cells))
    return "\n".join([*rows, r"\bottomrule", r"\end{tabular}"])


def _markdown(cell: Cell) -> str:
    text = f"**{cell.text}**" if cell.best else cell.text
    return f"{text} {cell.extra}".strip()


def _latex(cell: Cell) -> str:
    text = rf"\textbf{{{_tex(cell.text)}}}" if cell.best else _tex(cell.text)
    return f"{text} {_tex(cell.extra)}".strip()


def _ampersands(words: Sequence[str], cells: Sequence[Cell]) -> str:
    return " & ".join([*map(_tex, words), *map(_latex, cells)]) + r" \\"


def _tex(text: str) -> str:
    return "".join(_TEX.get(letter, letter) for letter in text)


def _named(lines: Sequence[Line]) -> Iterator[tuple[list[str], Line]]:
    """Lines with their names, blank where the line above says the same."""
    above = ("", "")
    for line in lines:
        section = "" if line.section == above[0] else line.section
        method = "" if (line.section, line.method) == above else line.method
        above = (line.section, line.method)
        yield [section, method, line.source], line
