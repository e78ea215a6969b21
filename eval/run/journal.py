"""Finished requests of a unit, one fsynced JSON line each: what survives a kill -9.

A line is found again only by a request that equals it in everything that shapes an answer: the
identity of the run (checkpoint, pruner, settings, source files) and the request itself.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.digests import text_digest
from eval.results.records import typed

if TYPE_CHECKING:
    from lmms_eval.api.instance import Instance

    from llava_hivtp.answer import Answer

logger = logging.getLogger(__name__)


class Journal:
    """Answers by request; `add` returns when they are on the disk."""

    def __init__(self, path: Path, identity: str) -> None:
        """Open or create the file; `identity` stands for all that is equal between requests."""
        self.path, self.identity = path, identity
        path.parent.mkdir(parents=True, exist_ok=True)
        self._answers = _read(path)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def get(self, instance: Instance) -> Answer | None:
        """The answer to this request, if it was finished before."""
        return self._answers.get(self._key(instance))

    def add(self, finished: Sequence[tuple[Instance, Answer]]) -> None:
        """Keep answers for good."""
        found = {self._key(instance): answer for instance, answer in finished}
        lines = [_line(key, asdict(answer)) for key, answer in found.items()]
        data = memoryview("".join(line + "\n" for line in lines).encode())
        try:
            while data:
                data = data[os.write(self._file, data) :]
            os.fsync(self._file)
        except OSError as error:  # a full disk does not say where
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self._answers |= found

    def close(self) -> None:
        """Close the file; its lines stay."""
        os.close(self._file)

    def _key(self, instance: Instance) -> str:
        prompt, options, _, doc_id, task, split = instance.args
        return text_digest(
            json.dumps([self.identity, prompt, options, task, split, doc_id], sort_keys=True)
        )


def _line(key: str, answer: dict[str, Any]) -> str:
    return json.dumps({"key": key, "answer": answer, "sum": _sum(key, answer)})


def _sum(key: str, answer: dict[str, Any]) -> str:
    """Tells an altered line from the one that was written."""
    return text_digest(json.dumps([key, answer], sort_keys=True))


def _read(path: Path) -> dict[str, Answer]:
    """The whole lines of a journal; a last line cut short is removed from the file."""
    if not path.exists():
        return {}
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
    answers, broken = {}, 0
    for line in data[:whole].splitlines():
        try:
            key, answer = _parsed(line, path)
            answers[key] = answer
        except (ValueError, TypeError, KeyError, RecursionError):
            broken += 1
    if broken:
        logger.warning("%s: %d damaged lines ignored, their requests run again", path, broken)
    return answers


def _parsed(line: bytes, path: Path) -> tuple[str, Answer]:
    """Key and answer of a line; lines of older journals have no sum."""
    from llava_hivtp.answer import Answer

    record = json.loads(line)
    key, answer = record["key"], record["answer"]
    if record.get("sum", now := _sum(key, answer)) != now:
        raise ValueError("the line was altered")
    return key, typed(Answer, answer, path)
