"""Fetch what a run reads, where there is a network; a run itself never does."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from eval.benchmarks import data
from eval.benchmarks.record import Part
from eval.benchmarks.records import BENCHMARKS
from eval.digests import checkpoint_folder

logger = logging.getLogger(__name__)

# Other spellings of the same weights only cost disk.
UNUSED = ["*.msgpack", "*.h5", "*.onnx", "*.pth", "*.gguf"]


def fetch(model: str, tasks: Sequence[str], folder: Path) -> None:
    """Download the checkpoint, its vision tower and the data sets, unless they are here."""
    _fetch_checkpoint(model)
    for part in data.missing(folder, tasks):
        _fetch_part(part, folder)
    data.check(folder, tasks)


def _fetch_checkpoint(model: str) -> None:
    """A checkpoint into the hub's cache, and the vision tower its config names."""
    folder = _have(model) or _download(model)
    tower = json.loads((folder / "config.json").read_text()).get("mm_vision_tower")
    if tower and not (folder / tower).is_dir() and _have(tower) is None:
        _download(tower)


def _have(model: str) -> Path | None:
    try:
        return checkpoint_folder(model)
    except FileNotFoundError:
        return None


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download

    _need_network(model)
    logger.info("fetching %s", model)
    return Path(snapshot_download(model, ignore_patterns=UNUSED))


def _fetch_part(part: Part, root: Path) -> None:
    """The files of one configuration and split, without the rest of the repository."""
    from huggingface_hub import snapshot_download

    _need_network(part.repository)
    logger.info("fetching %s (%s)", part.repository, part.config or part.split)
    folder = root / part.repository
    snapshot_download(
        part.repository, repo_type="dataset", allow_patterns=part.patterns, local_dir=folder
    )
    _write_card(part.repository, root)


def _write_card(repository: str, root: Path) -> None:
    """Tell `load_dataset` which files are here: the original card lists those left out, too."""
    folder = root / repository
    head = data.front_matter(
        (
            part.config or "default",
            part.split,
            [file.relative_to(folder).as_posix() for file in data.files(root, part)],
        )
        for part in _parts_of(repository, root)
    )
    text = f"Files of the data set `{repository}`, as fetched by `python -m eval prefetch`."
    (folder / "README.md").write_text(f"{head}\n{text}\n")


def _parts_of(repository: str, root: Path) -> Iterable[Part]:
    """Every part of a repository that is here, each once."""
    known = dict.fromkeys(part for benchmark in BENCHMARKS.values() for part in benchmark.data)
    return [p for p in known if p.repository == repository and any(data.files(root, p))]


def _need_network(name: str) -> None:
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        raise FileNotFoundError(
            f"{name} is not here and HF_HUB_OFFLINE is set; run this where there is a network"
        )
