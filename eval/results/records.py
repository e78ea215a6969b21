"""What is stored of a unit, as typed records: read and written here and nowhere else.

A file that is absent or cut short reads as absent, so that a run does it again. A file that is
whole and holds something else is an error that names it.
"""

from __future__ import annotations

import hashlib
import json
import math
import types
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from eval.results import store

T = TypeVar("T")


class RecordError(ValueError):
    """A stored file that is damaged, or none of ours; the message names it."""


@dataclass(frozen=True)
class Tokens:
    """Means over the requests of a unit."""

    patches: float  # patch, merged and CLS tokens in the language model
    newlines: float
    total: float  # patch tokens had nothing been pruned
    generated: float
    mean_per_layer: float | None = None  # patches read and cached; None: all in every layer


@dataclass(frozen=True)
class Result:
    """The score of one row on one task, in `TASK.json`."""

    unit: dict[str, Any]  # model, row, pruner, arguments, layout, task, limit
    score: float | None  # on the paper's scale; None where lmms-eval gives no number
    metrics: dict[str, float]
    requests: int
    tokens: Tokens
    protocol: dict[str, Any]  # what must be equal in all rows of a table
    provenance: dict[str, Any]  # listed below a table, never compared
    seconds: float
    source: dict[str, str] | str | None = None  # digests of the code; text in older files
    samples: str | None = None  # SHA-256 of the samples' file; None in older files


@dataclass(frozen=True)
class Timing:
    """The times of one row on one task, in `TASK.timing.json`."""

    requests: int
    warmup: int
    ttft_ms: float
    throughput: float
    samples: list[list[float]]  # (seconds to the first token, to the whole answer, tokens)
    protocol: dict[str, Any]
    provenance: dict[str, Any]
    source: dict[str, str] | str | None = None
    preparation_ms: float | None = None  # of pixels and prompt, before the clock starts
    worked_share: float | None = None  # of the timed seconds on a CPU: `eval.clock.Watch`
    warnings: list[str] | None = None  # what makes the times doubtful; None in older files


@dataclass(frozen=True, slots=True)
class Sample:
    """One document, a line of `TASK.samples.jsonl`."""

    doc_id: int | str
    answer: str
    score: float  # in the task's own terms
    group: int | str  # what it stands or falls with, such as its image
    patches: int = 0
    newlines: int = 0
    total: int = 0
    generated: int = 0
    stratum: str = ""  # a category that is scored by itself
    mean_per_layer: float | None = None  # as in `Tokens`


@dataclass(frozen=True)
class Failure:
    """Why a unit failed, in `TASK.failed.json`."""

    error: str
    traceback: str = ""
    date: str = ""


def read_result(path: Path) -> Result | None:
    """The result of a unit; None if it is absent or cut short."""
    return _read(path, Result)


def read_timing(result: Path) -> Timing | None:
    """The times beside a result; None if they are absent or cut short."""
    return _read(store.beside(result, "timing.json"), Timing)


def read_failure(result: Path) -> Failure | None:
    """Why a unit failed; None if it did not. A damaged record is a failure, too."""
    path = store.beside(result, "failed.json")
    try:
        found = _read(path, Failure)
    except RecordError as error:
        return Failure(str(error))
    if found is None and path.exists():
        return Failure(f"{path} was cut short")
    return found


def has_samples(path: Path, result: Result) -> bool:
    """Whether the samples of a result are there, as many as it counts.

    Raises:
        RecordError: if they are other ones than those the result was stored with.
    """
    return _sample_bytes(path, result) is not None


def read_samples(path: Path, result: Result) -> list[Sample] | None:
    """The samples of a result, None if they are absent or cut short.

    Raises:
        RecordError: if they are other ones than those the result was stored with.
    """
    data = _sample_bytes(path, result)
    if data is None:
        return None
    file = store.beside(path, "samples.jsonl")
    try:  # one parse, not one per line
        lines = json.loads(b"[" + b",".join(data.splitlines()) + b"]")
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{file}: {error}") from error
    if result.samples is not None:  # as written, so nothing is left to check
        return [Sample(**line) for line in lines]
    return [typed(Sample, line, f"{file}:{number}") for number, line in enumerate(lines, 1)]


def write_samples(path: Path, samples: Sequence[Sample]) -> str:
    """Store the samples of a unit; returns the SHA-256 of the file, for its result."""
    lines = [_line(sample) for sample in samples]
    store.write_atomic(store.beside(path, "samples.jsonl"), lines)
    return hashlib.sha256("".join(line + "\n" for line in lines).encode()).hexdigest()


def write_result(path: Path, result: Result) -> None:
    """Store the result of a unit; its samples come first."""
    store.write_json_atomic(path, asdict(result))


def write_timing(path: Path, timing: Timing) -> None:
    """Store the times of a unit beside its result."""
    store.write_json_atomic(store.beside(path, "timing.json"), asdict(timing))


def write_failure(path: Path, failure: Failure) -> None:
    """Store why a unit failed beside its result."""
    store.write_json_atomic(store.beside(path, "failed.json"), asdict(failure))


def typed(cls: type[T], data: Any, where: object) -> T:
    """A dataclass from parsed JSON.

    Raises:
        RecordError: if a field is missing or of another type; the message starts with `where`.
    """
    if not isinstance(data, dict):
        raise RecordError(f"{where} holds {_short(data)}, no {cls.__name__}")
    values = {}
    for name, kind, required in _fields(cls):
        if name not in data:
            if required:
                raise RecordError(f"{where} is no {cls.__name__}: '{name}' is missing")
            continue
        value = data[name]
        if not _fits(value, kind):
            raise RecordError(f"{where}: '{name}' cannot be {_short(value)}")
        values[name] = typed(kind, value, where) if kind is Tokens else value
    return cls(**values)


def _read(path: Path, cls: type[T]) -> T | None:
    try:
        data = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except RecursionError as error:
        raise RecordError(f"{path}: {error}") from error
    except ValueError:
        return None  # cut short
    return typed(cls, data, path)


def _sample_bytes(path: Path, result: Result) -> bytes | None:
    """The file of a result's samples, None if it is absent or lacks lines."""
    file = store.beside(path, "samples.jsonl")
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return None
    if data.count(b"\n") != result.requests:
        return None
    if result.samples not in (None, hashlib.sha256(data).hexdigest()):
        raise RecordError(
            f"{file} is not what {path.name} was stored with: remove both, or choose another --out"
        )
    return data


def _line(sample: Sample) -> str:
    record = asdict(sample)
    for name, absent in (("stratum", ""), ("mean_per_layer", None)):
        if record[name] == absent:
            del record[name]
    return json.dumps(record)


@cache
def _fields(cls: type) -> list[tuple[str, Any, bool]]:
    """(name, type, whether it must be there) of every field."""
    hints = get_type_hints(cls)
    return [(f.name, hints[f.name], f.default is MISSING) for f in fields(cls)]


def _fits(value: Any, kind: Any) -> bool:
    """Whether parsed JSON is of a field's type; whole numbers are numbers, true is none."""
    if kind is Any:
        return True
    if kind is Tokens:
        return isinstance(value, dict)
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(item, inner[1]) for item in value.values())
    if kind is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and math.isfinite(value)
    return type(value) is kind


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
