"""What an answer depends on, as digests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from eval import ROOT

WHOLE = 4 * 2**20  # bytes up to which a file is read whole
BLOCK, BLOCKS = 2**16, 64  # of a larger one: this many, evenly spread, the ends included
CHECKPOINT_FILES = {".json", ".safetensors", ".bin", ".model", ".txt"}


def digest_files(folder: Path, files: Iterable[Path]) -> str:
    """Names, sizes and contents of files, 16 hex digits; large ones are sampled, not read whole."""
    digest = hashlib.sha256()
    for file in sorted(files):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder).as_posix()} {size}\n".encode())
        with file.open("rb") as content:
            if size <= WHOLE:
                digest.update(content.read())
                continue
            for i in range(BLOCKS):
                content.seek((size - BLOCK) * i // (BLOCKS - 1))
                digest.update(content.read(BLOCK))
    return digest.hexdigest()[:16]


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
    """Digest of configuration, tokenizer and weights."""
    folder = checkpoint_folder(model)
    files = [file for file in folder.rglob("*") if file.suffix in CHECKPOINT_FILES]
    return digest_files(folder, [file for file in files if file.is_file()])


def sources_digest(own: Path) -> str:
    """Digest of the library's source files, 16 digits, and of a method's own file, 16 more.

    Files of other methods do not count.
    """
    library = ROOT / "llava_hivtp"
    others = set((library / "pruners").glob("*.py")) - {library / "pruners" / "base.py"}
    shared = digest_files(library, set(library.rglob("*.py")) - others)
    return shared + digest_files(own.parent, [own])


def text_digest(text: str) -> str:
    """Digest of a text, 16 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
