"""The data of the benchmarks: where they lie, and whether they are there.

A data folder mirrors the names of the hub (`DATA/lmms-lab-encoder/MME/...`): run from inside it,
lmms-eval's own tasks find their data without a network or a login.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from eval.benchmarks.record import Part
from eval.benchmarks.records import BENCHMARKS
from eval.digests import digest_files


def files(data: Path, part: Part) -> list[Path]:
    """The files of a part in a data folder."""
    folder = data / part.repository
    return sorted(file for pattern in part.patterns for file in folder.glob(pattern))


def missing(data: Path, tasks: Iterable[str]) -> list[Part]:
    """Parts that tasks read and a data folder lacks, or holds some files of only."""
    parts = dict.fromkeys(part for task in tasks for part in BENCHMARKS[task].data)
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
    return digest_files(
        data, [file for part in BENCHMARKS[task].data for file in files(data, part)]
    )


def front_matter(parts: Iterable[tuple[str, str, Iterable[str]]]) -> str:
    """Head of a README.md that tells `load_dataset` which files make up what.

    Args:
        parts: configuration, split and file names, as often as there are splits.
    """
    configs: dict[str, list[str]] = {}
    for config, split, files in parts:
        lines = configs.setdefault(config, [])
        lines += [f"  - split: {split}", "    path:", *(f"    - {file}" for file in files)]
    found = [[f"- config_name: {name}", "  data_files:", *lines] for name, lines in configs.items()]
    return "\n".join(["---", "configs:", *chain.from_iterable(found), "---", ""])
