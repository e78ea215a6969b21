"""The embedded model in transformers' own class beside the official one, request by request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval import ROOT, machine
from eval.markdown import pipes
from eval.nano import CHECKPOINTS
from eval.nano.asked import answers, ask
from eval.nano.datasets import write
from eval.plan.table import Table, load_table, select_rows
from llava_hivtp.convert import to_transformers
from llava_hivtp.lmms import LlavaHIVTP

PARTS = {"nodrop": ("table1", "small"), "anyres": ("table2", "large")}  # table, pictures
CLASSES = ("official", "transformers")
REQUESTS, DIFFER = "requests", ("answers differ", "scores differ", "kept differ")


@dataclass(frozen=True)
class Comparison:
    """What is asked, and where the answers lie."""

    folder: Path  # data, the converted model, the answers; what lies there is not asked again
    variant: str = "nodrop"  # or anyres
    rows: str = "full hivtp-25"
    limit: int | None = None  # questions of each set

    @property
    def table(self) -> Table:
        """Its tasks are asked."""
        return load_table(ROOT / "configs" / "nano" / f"{PARTS[self.variant][0]}.yaml")

    def file_of(self, row: str, cls: str) -> Path:
        """Where the answers of a row lie."""
        return self.folder / f"{self.variant}-{row}-{cls}-{self.limit or 'all'}.json"

    def ask(self) -> None:
        """Ask what is left under lmms-eval, one class after the other."""
        table = self.table
        for cls in CLASSES:
            rows = select_rows(table, self.rows)
            rows = [row for row in rows if not self.file_of(row.id, cls).exists()]
            if not rows:
                continue
            images = PARTS[self.variant][1]
            data = write(self.folder / images, "quick", images)
            model = CHECKPOINTS / self.variant
            if cls == "transformers":
                model = to_transformers(model, self.folder / self.variant)
            lm = LlavaHIVTP(str(model), dtype="float32", device_map="cpu", batch_size=16, workers=0)
            for row in rows:
                ask(lm, row, table.tasks, data, self.limit, self.file_of(row.id, cls))

    def counts(self) -> Iterator[dict[str, Any]]:
        """How many requests of each row and set differ between the classes."""
        for row in select_rows(self.table, self.rows):
            official, other = (answers(self.file_of(row.id, cls)) for cls in CLASSES)
            for task, theirs in official["tasks"].items():
                pairs = list(zip(theirs, other["tasks"][task], strict=True))
                yield {
                    "model": self.variant,
                    "row": row.id,
                    "task": task,
                    REQUESTS: len(pairs),
                    "different": len({answer for answer, *_ in theirs}),
                    **{k: sum(a[i] != b[i] for a, b in pairs) for i, k in enumerate(DIFFER)},
                    "commit": other["commit"],
                }


def compare(comparisons: Sequence[Comparison], out: Path) -> str:
    """Ask what is left and write a Markdown table; returns the text."""
    rows = []
    for comparison in comparisons:
        comparison.folder.mkdir(parents=True, exist_ok=True)
        comparison.ask()
        rows += comparison.counts()
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text := _report(rows))
    return text


def _report(rows: list[dict[str, Any]]) -> str:
    names = [name for name in rows[0] if name != "commit"]
    cells = [names, *([str(row[name]) for name in names] for row in rows)]
    sums = {name: str(sum(row[name] for row in rows)) for name in (REQUESTS, *DIFFER)}
    cells.append(["all", *(sums.get(name, "") for name in names[1:])])
    return (
        "`python -m eval.nano compare`: the embedded models under lmms-eval in official LLaVA's "
        "classes and, converted, in transformers' own, request by request. `different` are the "
        f"different answers of a set. Float32, batch 16, one thread, {machine.device_name()}, "
        f"torch {machine.version('torch')}, transformers {machine.version('transformers')}, "
        f"commit {rows[0]['commit']}.\n\n{pipes(cells, left=3)}\n"
    )
