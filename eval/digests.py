"""Checkpoints, data and text as digests: every byte counts, large files are read once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

REMEMBERED = 4 * 2**20  # bytes from which on a file's digest is kept, not computed again
CHECKPOINT_FILES = {".json", ".safetensors", ".bin", ".model", ".txt"}


def digest_files(folder: Path, files: Iterable[Path]) -> str:
    """Names, sizes and every byte of files, as 16 hex digits."""
    digest = hashlib.sha256()
    for file in sorted(files):
        name, size = file.relative_to(folder).as_posix(), file.stat().st_size
        digest.update(f"{name} {size} {_content(file)}\n".encode())
    return digest.hexdigest()[:16]


def _content(file: Path) -> str:
    """SHA-256 of a file, computed once for each size and time of it."""
    stat = file.stat()
    if stat.st_size < REMEMBERED:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    state = [str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llava_hivtp"
    kept = home / f"{text_digest(state[0])}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        record = json.loads(kept.read_bytes())
        if record["state"] == state:
            return str(record["sha256"])
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    with contextlib.suppress(OSError):  # a home that cannot be written to costs time only
        home.mkdir(parents=True, exist_ok=True)
        temporary = kept.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps({"state": state, "sha256": found}))
        temporary.replace(kept)
    return found


def checkpoint_folder(model: str) -> Path:
    """Where a checkpoint lies: a folder, or a hub id downloaded before."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"no checkpoint {model}: it is no folder and was not downloaded; "
            f"fetch it with `python -m eval prefetch CONFIG --model {model}`"
        ) from error


def checkpoint_digest(model: str) -> str:
    """Digest of configuration, tokenizer, weights, and of a vision tower that lies elsewhere."""
    folder = checkpoint_folder(model)
    try:
        tower = json.loads((folder / "config.json").read_bytes()).get("mm_vision_tower")
    except (OSError, ValueError, AttributeError):
        tower = None  # whoever loads it says what is wrong
    own = _folder_digest(folder)
    if not isinstance(tower, str) or (folder / tower).is_dir():
        return own
    return text_digest(own + _folder_digest(checkpoint_folder(tower)))


def _folder_digest(folder: Path) -> str:
    files = [file for file in folder.rglob("*") if file.suffix in CHECKPOINT_FILES]
    return digest_files(folder, [file for file in files if file.is_file()])


def text_digest(text: str) -> str:
    """Digest of a text, 16 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
