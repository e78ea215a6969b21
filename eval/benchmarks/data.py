"""The eight data sets: where they lie, and whether they are there.

A data folder mirrors the names of the hub (`DATA/lmms-lab-encoder/MME/...`): run from inside it,
lmms-eval's own tasks find their data without a network or a login.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from eval.results.identity import digest_files


@dataclass(frozen=True)
class Part:
    """One configuration and split of a data set."""

    repository: str
    split: str
    config: str | None = None
    documents: int = 0  # questions in it

    @property
    def patterns(self) -> list[str]:
        """Its files in the repository."""
        folders = [f"{self.config}/"] if self.config else ["", "data/"]
        return [f"{folder}{self.split}-*-of-*.parquet" for folder in folders]


_MMBENCH = (Part("lmms-lab-encoder/MMBench", "dev", "en", 4329),)
PARTS: dict[str, tuple[Part, ...]] = {
    "mme": (Part("lmms-lab-encoder/MME", "test", None, 2374),),
    "pope": (Part("lmms-lab-encoder/POPE", "test", None, 9000),),
    "textvqa_val": (Part("lmms-lab-encoder/textvqa", "validation", None, 5000),),
    "mmbench_en_dev": _MMBENCH,
    "mmbench_en_dev_static": _MMBENCH,
    "scienceqa_img": (Part("lmms-lab-encoder/ScienceQA", "test", "ScienceQA-IMG", 2017),),
    "ocrbench": (Part("echo840/OCRBench", "test", None, 1000),),
    "gqa": (
        Part("lmms-lab-encoder/GQA", "testdev", "testdev_balanced_instructions", 12578),
        Part("lmms-lab-encoder/GQA", "testdev", "testdev_balanced_images"),
    ),
    "ai2d": (Part("lmms-lab-encoder/ai2d", "test", None, 3088),),
}


def documents(task: str, limit: int | None = None) -> int:
    """Requests of a task on the official data."""
    count = sum(part.documents for part in PARTS[task])
    return count if limit is None else min(limit, count)


def files(data: Path, part: Part) -> list[Path]:
    """The files of a part in a data folder."""
    folder = data / part.repository
    return sorted(file for pattern in part.patterns for file in folder.glob(pattern))


def missing(data: Path, tasks: Iterable[str]) -> list[Part]:
    """Parts that tasks read and a data folder lacks, or holds some files of only."""
    parts = dict.fromkeys(part for task in tasks for part in PARTS[task])
    return [part for part in parts if not _complete([file.stem for file in files(data, part)])]


def _complete(names: list[str]) -> bool:
    """Whether the files `...-00000-of-00003` and so on are all there."""
    counts = {name.rpartition("-of-")[2] for name in names}
    return counts == {f"{len(names):05}"}


def check(data: Path, tasks: Iterable[str]) -> None:
    """Raise a FileNotFoundError that says what to fetch, unless everything is there."""
    lacking = missing(data, tasks)
    if lacking:
        names = ", ".join(f"{part.repository} ({part.config or part.split})" for part in lacking)
        raise FileNotFoundError(
            f"{data} lacks {names}; fetch them where there is a network with "
            f"`python -m eval prefetch CONFIG --data {data}`, or draw small stand-ins with "
            f"`python -m eval.nano data --out {data}`"
        )


def digest(data: Path, task: str) -> str:
    """Digest of what a task reads: two rows of a table must have seen the same."""
    return digest_files(data, [file for part in PARTS[task] for file in files(data, part)])
