"""Questions about images to draw with: a benchmark's, or the embedded model's world."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from eval import ROOT
from eval.benchmarks import data
from eval.benchmarks.records import BENCHMARKS
from eval.nano import CHECKPOINTS

SHORT = "Answer the question using a single word or phrase."  # as LLaVA is asked in benchmarks
TASKS = tuple(task for task, benchmark in BENCHMARKS.items() if benchmark.stands_alone)


@dataclass(frozen=True)
class ImageQuestion:
    """One question about one image."""

    image: Image.Image
    question: str
    gold: str = ""  # empty if nobody knows

    @property
    def prompt(self) -> str:
        """What the model reads."""
        return f"{self.question}\n{SHORT}"


def benchmark_questions(task: str, folder: Path) -> Iterator[ImageQuestion]:
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
    for row in rows:
        image = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
        question = row["question"].strip()
        yield ImageQuestion(image, question, BENCHMARKS[task].gold(row))


def data_of(checkpoint: str | Path, *, tiled: bool, full: bool) -> Path:
    """Where a checkpoint's questions lie; a model that comes with the project has its own world.

    Args:
        checkpoint: folder or hub id.
        tiled: an AnyRes model, to which large pictures are shown.
        full: ten times the questions.
    """
    if CHECKPOINTS not in Path(checkpoint).resolve().parents:
        return Path("data")
    from eval.nano.datasets import write

    images, size = "large" if tiled else "small", "full" if full else "quick"
    return write(ROOT / f"results/nano/figures-{images}-{size}", size, images)


def _rows(file: Path) -> Iterator[dict]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file) as table:
        for batch in table.iter_batches(batch_size=32):
            yield from batch.to_pylist()
