"""Result files: written whole or not at all, locked while in work.

The files of one unit share a stem: `pope.json` (the result), `pope.samples.jsonl`,
`pope.timing.json`, `pope.failed.json`, `pope.journal.jsonl`, `pope.lock`.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

KINDS = ("json", "samples.jsonl", "timing.json", "failed.json")  # written whole


def beside(result: Path, kind: str) -> Path:
    """`OUT/.../pope.limit8.json`, "samples.jsonl" -> `OUT/.../pope.limit8.samples.jsonl`."""
    return result.with_suffix(f".{kind}")


def write_json_atomic(path: Path, data: Any) -> None:
    """Write JSON so that a reader finds the old file or the whole new one, whatever happens."""
    write_atomic(path, [json.dumps(data, indent=1)])


PATIENCE_S = 0.5  # `status` probes a lock for an instant


@contextmanager
def locked(result: Path, patience_s: float = PATIENCE_S) -> Iterator[bool]:
    """Hold a unit: yields True if it is ours, False if another process keeps it for so long.

    The kernel drops the lock when its process ends, however it ends. Children forked inside the
    block share it.
    """
    path = beside(result, "lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = _try_lock(path, patience_s)
    if handle is None:
        yield False
        return
    try:
        for leftover in _half_written(result):
            leftover.unlink(missing_ok=True)
        yield True
    finally:
        path.unlink(missing_ok=True)  # while held: who waits on the old file looks again
        os.close(handle)


def tidy(result: Path) -> None:
    """Remove what a killed process left of a finished unit, unless one works on it."""
    leftovers = [beside(result, kind) for kind in ("journal.jsonl", "lock")]
    if any(file.exists() for file in leftovers) or _half_written(result):
        with locked(result) as ours:
            if ours:
                leftovers[0].unlink(missing_ok=True)


def _try_lock(path: Path, patience_s: float) -> int | None:
    """An open descriptor that holds the lock; None if another process keeps it."""
    deadline = time.monotonic() + patience_s
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if _flock(handle, fcntl.LOCK_EX):
            if _is_still(path, handle):
                return handle
        elif time.monotonic() >= deadline:
            os.close(handle)
            return None
        os.close(handle)
        time.sleep(0.02)


def _flock(handle: int, how: int) -> bool:
    try:
        fcntl.flock(handle, how | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        raise OSError(
            error.errno, f"{error.strerror}: the folder's file system has no locks, choose another"
        ) from error


def _is_still(path: Path, handle: int) -> bool:
    """Whether the path leads to the open file: its last owner may have removed it."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def held(result: Path) -> bool:
    """Whether a process works on a unit."""
    path = beside(result, "lock")
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not _flock(handle, fcntl.LOCK_SH)
    finally:
        os.close(handle)


def write_atomic(path: Path, lines: Iterable[str]) -> None:
    """Write lines so that a reader finds the old file or the whole new one, whatever happens.

    Raises:
        OSError: with the path, where a full disk alone would not name it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(line + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _sync_folder(folder: Path) -> None:
    """Make the new name survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _half_written(result: Path) -> list[Path]:
    """What a process left behind that died while it wrote a file of a unit."""
    names = [glob.escape(beside(result, kind).name) for kind in KINDS]
    return [file for name in names for file in result.parent.glob(f".{name}.*.tmp")]
