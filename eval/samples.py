"""Questions about images to draw with: a benchmark's, the embedded model's world, or one's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from PIL import Image

SHORT = "Answer the question using a single word or phrase."  # as LLaVA is asked in benchmarks
ROOT = Path(__file__).parents[1]
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


@dataclass(frozen=True)
class Benchmark:
    """Where the hub keeps a benchmark of open questions."""

    repository: str
    split: str


BENCHMARKS = {
    "pope": Benchmark("lmms-lab-encoder/POPE", "test"),
    "mme": Benchmark("lmms-lab-encoder/MME", "test"),
    "textvqa_val": Benchmark("lmms-lab-encoder/textvqa", "validation"),
    "ocrbench": Benchmark("echo840/OCRBench", "test"),
}


def read_samples(task: str, data: Path | None, limit: int | None) -> Iterator[Asked]:
    """Questions of a benchmark from `data`, a folder that mirrors the hub, or from the cache.

    Raises:
        ValueError: for another task, or where its data are not here.
    """
    if task not in BENCHMARKS:
        raise ValueError(f"unknown task {task!r}; choose from {', '.join(BENCHMARKS)}")
    from datasets import load_dataset

    where = BENCHMARKS[task]
    inside = data / where.repository if data else None
    if inside is not None and not inside.is_dir():
        raise ValueError(f"{data} holds no {where.repository}: fetch it, or leave --data out")
    try:
        rows = load_dataset(str(inside or where.repository), split=where.split)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {inside or where.repository}: {error}") from error
    for row in islice(rows, limit):
        answers = row.get("answer", row.get("answers"))
        gold = answers if isinstance(answers, str) else answers[0]
        yield Asked(row["image"].convert("RGB"), row["question"].strip(), gold)


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
