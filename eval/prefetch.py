"""Fetch what a run reads, where there is a network; a run itself never does."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from eval import data as datasets
from eval.data import Part
from eval.identity import checkpoint_folder
from eval.rows import ConfigError, load_table, select_tasks

# Other spellings of the same weights only cost disk.
UNUSED = ["*.msgpack", "*.h5", "*.onnx", "*.pth", "*.gguf"]


def prefetch(
    config: Annotated[Path, typer.Argument(help="YAML of the table, such as configs/table1.yaml.")],
    model: Annotated[
        str | None, typer.Option(help="Hub id or folder of the checkpoint; the YAML's by default.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks or columns: 'mme pope'.")] = None,
    data: Annotated[Path, typer.Option(help="Folder for the data sets.")] = Path("data"),
) -> None:
    """Download the checkpoint, its vision tower and the data sets, unless they are here."""
    try:
        table = load_table(config, model)
        names = select_tasks(table, tasks)
        _fetch_checkpoint(table.model)
        for part in datasets.missing(data, names):
            _fetch_part(part, data)
        datasets.check(data, names)
    except (ConfigError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"{table.model} and {len(names)} data sets are here")


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
    typer.echo(f"fetching {model}")
    return Path(snapshot_download(model, ignore_patterns=UNUSED))


def _fetch_part(part: Part, data: Path) -> None:
    """The files of one configuration and split, without the rest of the repository."""
    from huggingface_hub import snapshot_download

    _need_network(part.repository)
    typer.echo(f"fetching {part.repository} ({part.config or part.split})")
    folder = data / part.repository
    snapshot_download(
        part.repository, repo_type="dataset", allow_patterns=part.patterns, local_dir=folder
    )
    _write_card(part.repository, data)


def _write_card(repository: str, data: Path) -> None:
    """Tell `load_dataset` which files are here: the original card lists those left out, too."""
    lines = ["---", "configs:"]
    for part in _parts_of(repository, data):
        lines += [f"- config_name: {part.config or 'default'}", "  data_files:"]
        lines += [f"  - split: {part.split}", "    path:"]
        lines += [
            f"    - {file.relative_to(data / repository).as_posix()}"
            for file in datasets.files(data, part)
        ]
    text = f"Files of the data set `{repository}`, as fetched by `python -m eval prefetch`."
    (data / repository / "README.md").write_text("\n".join([*lines, "---", "", text, ""]))


def _parts_of(repository: str, data: Path) -> Iterable[Part]:
    """Every part of a repository that is here, each once."""
    known = dict.fromkeys(part for parts in datasets.PARTS.values() for part in parts)
    return [p for p in known if p.repository == repository and any(datasets.files(data, p))]


def _need_network(name: str) -> None:
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        raise FileNotFoundError(
            f"{name} is not here and HF_HUB_OFFLINE is set; run this where there is a network"
        )
