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

from eval.results.identity import text_digest

if TYPE_CHECKING:
    from lmms_eval.api.instance import Instance

    from llava_hivtp.lmms import Answer

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
        from llava_hivtp.lmms import Answer

        found = self._answers.get(self._key(instance))
        return None if found is None else Answer(**found)

    def add(self, finished: Sequence[tuple[Instance, Answer]]) -> None:
        """Keep answers for good."""
        records = {self._key(instance): asdict(answer) for instance, answer in finished}
        lines = [json.dumps({"key": key, "answer": answer}) for key, answer in records.items()]
        data = memoryview("".join(line + "\n" for line in lines).encode())
        while data:
            data = data[os.write(self._file, data) :]
        os.fsync(self._file)
        self._answers |= records

    def close(self) -> None:
        """Close the file; its lines stay."""
        os.close(self._file)

    def _key(self, instance: Instance) -> str:
        prompt, options, _, doc_id, task, split = instance.args
        return text_digest(
            json.dumps([self.identity, prompt, options, task, split, doc_id], sort_keys=True)
        )


def _read(path: Path) -> dict[str, dict[str, Any]]:
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
            record = json.loads(line)
            answers[record["key"]] = dict(record["answer"])
        except (ValueError, TypeError, KeyError):
            broken += 1
    if broken:
        logger.warning("%s: %d damaged lines ignored, their requests run again", path, broken)
    return answers
