"""Result files: written whole or not at all, read back, locked while in work.

The files of one unit share a stem: `pope.json` (the result), `pope.samples.jsonl`,
`pope.timing.json`, `pope.failed.json`, `pope.lock`. A file cut short reads as absent.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RESULT_KEYS = frozenset(
    {"unit", "score", "metrics", "requests", "tokens", "protocol", "provenance", "seconds"}
)
TIMING_KEYS = frozenset(
    {"requests", "warmup", "ttft_ms", "throughput", "samples", "protocol", "provenance"}
)
SAMPLE_KEYS = frozenset({"doc_id", "answer", "score", "group"})


def beside(result: Path, kind: str) -> Path:
    """`OUT/.../pope.limit8.json`, "samples.jsonl" -> `OUT/.../pope.limit8.samples.jsonl`."""
    return result.with_suffix(f".{kind}")


def write_json_atomic(path: Path, data: Any) -> None:
    """Write JSON so that a reader finds the old file or the whole new one, whatever happens."""
    _write_atomic(path, [json.dumps(data, indent=1)])


def write_jsonl_atomic(path: Path, rows: Iterable[Any]) -> None:
    """Like `write_json_atomic`, one row per line."""
    _write_atomic(path, (json.dumps(row) for row in rows))


def read_result(path: Path) -> dict[str, Any] | None:
    """The result of a unit, or None if it is absent, cut short or incomplete."""
    return _complete(_read_json(path), RESULT_KEYS)


def read_timing(result: Path) -> dict[str, Any] | None:
    """The timing pass stored beside a result, or None."""
    return _complete(_read_json(beside(result, "timing.json")), TIMING_KEYS)


def read_samples(result: Path) -> list[dict[str, Any]] | None:
    """The per-document lines stored beside a result, or None if any is missing or damaged."""
    try:
        lines = beside(result, "samples.jsonl").read_bytes().strip(b"\n").split(b"\n")
        samples = json.loads(b"[" + b",".join(lines) + b"]")  # one parse, not one per line
    except (OSError, ValueError):
        return None
    whole = all(isinstance(sample, dict) and sample.keys() >= SAMPLE_KEYS for sample in samples)
    return samples if whole else None


def state(result: Path) -> str:
    """`done`, `running`, `failed` or `missing`; a process that died is not running."""
    if read_result(result) is not None:
        return "done"
    if held(result):
        return "running"
    return "failed" if beside(result, "failed.json").exists() else "missing"


def failure(result: Path) -> str:
    """Why a unit failed, in one line."""
    record = _read_json(beside(result, "failed.json")) or {}
    return str(record.get("error", "the record of the failure cannot be read"))


@contextmanager
def locked(result: Path) -> Iterator[bool]:
    """Hold a unit: yields True if it is ours, False if another process works on it.

    The kernel drops the lock when its process ends, however it ends. Children forked inside the
    block share it.
    """
    path = beside(result, "lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = _try_lock(path, patience_s=0.5)
    if handle is None:
        yield False
        return
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)  # while held: who waits on the old file looks again
        os.close(handle)


def _try_lock(path: Path, patience_s: float) -> int | None:
    """An open descriptor that holds the lock; None if another process keeps it."""
    deadline = time.monotonic() + patience_s  # `status` probes a lock for an instant
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


def _write_atomic(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(line + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make the new name survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def _complete(data: Any, keys: frozenset[str]) -> dict[str, Any] | None:
    return data if isinstance(data, dict) and data.keys() >= keys else None
