"""Questions about images to draw with: a benchmark's, or the embedded model's world."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from PIL import Image

from eval import ROOT
from eval.benchmarks import data
from eval.benchmarks.records import BENCHMARKS

SHORT = "Answer the question using a single word or phrase."  # as LLaVA is asked in benchmarks
TASKS = tuple(task for task, benchmark in BENCHMARKS.items() if benchmark.stands_alone)
EMBEDDED = ROOT / "eval/nano/checkpoints/v15"


@dataclass(frozen=True)
class Asked:
    """One question."""

    image: Image.Image
    question: str
    gold: str = ""  # empty if nobody knows

    @property
    def prompt(self) -> str:
        """What the model reads."""
        return f"{self.question}\n{SHORT}"


def read_samples(task: str, folder: Path, limit: int | None = None) -> Iterator[Asked]:
    """Questions of a benchmark from a folder that mirrors the hub.

    Raises:
        ValueError: for a task that is not one of TASKS.
        FileNotFoundError: if its data are not there.
    """
    if task not in TASKS:
        raise ValueError(f"--task must be one of {', '.join(TASKS)}, got {task!r}")
    data.check(folder, [task])
    (part,) = BENCHMARKS[task].data
    # Not through `datasets`: its cache takes two files of one name in two folders for the same.
    rows = (row for file in data.files(folder, part) for row in _rows(file))
    for row in islice(rows, limit):
        image = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
        yield Asked(image, row["question"].strip(), BENCHMARKS[task].gold(row))


def embedded_data(images: str, size: str) -> Path:
    """Draw the embedded model's data sets, unless they are there.

    Args:
        images: small or large, for the flat or the AnyRes checkpoint.
        size: quick or full.
    """
    from eval.nano.datasets import write

    return write(ROOT / f"results/nano/figures-{images}-{size}", size, images)


def embedded_model() -> str:
    """The checkpoint that comes with the project.

    Raises:
        FileNotFoundError: if this checkout has none.
    """
    if not (EMBEDDED / "config.json").is_file():
        raise FileNotFoundError(f"no embedded model at {EMBEDDED}: name a checkpoint with --model")
    return str(EMBEDDED)


def _rows(file: Path) -> Iterator[dict]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file) as table:
        for batch in table.iter_batches(batch_size=32):
            yield from batch.to_pylist()
