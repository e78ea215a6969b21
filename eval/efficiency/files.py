"""One CSV and one Markdown file that grow with every setting, and a plot of each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.efficiency import report
from eval.efficiency.comparison import Result
from eval.efficiency.plot import draw
from eval.plan.table import Table


class Files:
    """What is written, under one stem."""

    def __init__(
        self, stem: Path, lengths: tuple[int, ...], machine: dict[str, str], table: Table | None
    ) -> None:
        self.stem, self.lengths, self.machine, self.table = stem, lengths, machine, table
        self._rows: list[dict[str, Any]] = []
        self._sections: list[str] = []

    def named(self, ending: str) -> Path:
        """The stem may hold dots: llava-v1.5-7b."""
        return self.stem.with_name(self.stem.name + ending)

    def add(self, results: Sequence[Result]) -> str:
        """Write everything so far, so that an interruption loses one setting; returns the news."""
        section = report.markdown(results, self.lengths, self.machine, self.table)
        self._sections.append(section)
        self._rows += report.rows(results, self.lengths, self.machine)
        report.write_csv(self.named(".csv"), self._rows)
        self._write_text()
        setting, batch = results[0].setting, results[0].request.batch
        wide, high = setting.size
        middle = self.lengths[len(self.lengths) // 2]
        draw(self.named(f"-{wide}x{high}-batch{batch}.png"), results, middle, self.table)
        return section

    def remark(self, said: str) -> str:
        """A line below the last setting; returns it."""
        self._sections[-1] += f"- {said}\n"
        self._write_text()
        return f"- {said}"

    def _write_text(self) -> None:
        self.named(".md").write_text("\n".join(self._sections))
