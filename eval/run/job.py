"""The units one process works on; others may work on the same folder at the same time."""

from __future__ import annotations

import logging
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.benchmarks import data
from eval.plan.table import Table
from eval.plan.units import Unit
from eval.results import store
from eval.results.identity import checkpoint_folder
from eval.results.stale import Present
from eval.run.progress import duration
from eval.run.ranks import own_rank

if TYPE_CHECKING:
    from eval.run.worker import Worker
    from llava_hivtp.zero3 import Team

logger = logging.getLogger(__name__)


class Stopped(BaseException):
    """A signal asked the process to end: no failure of the unit in work."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


@dataclass
class Job:
    """What one process was asked to do."""

    table: Table
    units: Sequence[Unit]
    data: Path
    batch: int = 1
    timing_n: int = 0  # requests to time per unit; 0: no timing pass
    arguments: dict[str, Any] = field(default_factory=dict)  # of the model
    started: float = field(default_factory=time.time)
    failures: dict[Path, str] = field(default_factory=dict)  # this process's, disk full or not
    present: Present = field(init=False)  # once the job runs

    def run(self) -> int:
        """Do what is left of the units; returns how many of them failed."""
        if not self.units:
            return 0
        checkpoint_folder(self.table.model)  # says so if there is none
        self.present = Present(self.table.model)
        left = [unit for unit in self.units if self._left(unit)]
        logger.info("%d of %d units are done", len(self.units) - len(left), len(self.units))
        if left:
            data.check(self.data, [unit.task for unit in left])
            left.sort(key=lambda unit: store.beside(unit.path, "failed.json").exists())  # last
            with own_rank(bool(self.arguments.get("zero3"))) as rank, _signals():
                if rank.team and rank.index:
                    logger.setLevel(logging.WARNING)
                worker = self._load()
                self._agree(worker)
                for unit in rank.order(left):
                    self._try(worker, unit)
                    if rank.team and self.failures:
                        break  # out of step: the launcher ends the others
                else:
                    rank.wait()
        failed = {unit.path: unit for unit in self.units if self._failed(unit)}
        for path, unit in failed.items():
            reason = self.failures.get(path) or store.failure(path)
            logger.error("failed: %s %s: %s", unit.row.id, unit.task, reason)
        return len(failed)

    def _left(self, unit: Unit) -> bool:
        return self._unscored(unit) or self._untimed(unit)

    def _unscored(self, unit: Unit) -> bool:
        return not self._holds(unit, store.read_result(unit.path))

    def _untimed(self, unit: Unit) -> bool:
        return bool(self.timing_n) and not self._holds(unit, store.read_timing(unit.path))

    def _holds(self, unit: Unit, record: dict[str, Any] | None) -> bool:
        """Whether there is a record, of the checkpoint and the source files as they are."""
        return record is not None and not self.present.change(unit.row, record)

    def _failed(self, unit: Unit) -> bool:
        """Whether a unit failed since this job began, here or in another process."""
        record = store.beside(unit.path, "failed.json")
        recorded = record.exists() and record.stat().st_mtime >= self.started
        return unit.path in self.failures or recorded

    def _load(self) -> Worker:
        from eval.run.worker import Worker

        return Worker(self.table.model, self.table.layout, self.batch, self.data, self.arguments)

    def _agree(self, worker: Worker) -> None:
        """Refuse to add to results that no table could show beside the new ones."""
        for unit in self.units:
            found = store.read_result(unit.path)
            if not self._holds(unit, found):
                continue
            now = worker.accuracy_protocol(unit.task)
            then = found["protocol"] | {"data": found["protocol"]["task"].get("data")}
            now["data"] = now.pop("task")["data"]
            for name, value in now.items():
                if then.get(name) != value:
                    raise ValueError(
                        f"{unit.path} was measured with {name} {then.get(name)}, this run has "
                        f"{value}: choose another --out, or remove it"
                    )

    def _try(self, worker: Worker, unit: Unit) -> None:
        try:
            with self._claimed(unit, worker.lm.team) as ours:
                if ours:
                    self._do(worker, unit)
        except Exception as error:
            self._fail(unit, error)

    @contextmanager
    def _claimed(self, unit: Unit, team: Team) -> Iterator[bool]:
        """Hold a unit that is left to do: yields what the first process of the team finds."""
        if team.index:
            yield team.exchange(False)[0]
            return
        with store.locked(unit.path) as ours:
            yield team.exchange(ours and not self._failed(unit) and self._left(unit))[0]

    def _do(self, worker: Worker, unit: Unit) -> None:
        name, started = f"{unit.row.id} {unit.task}", time.monotonic()
        if self._unscored(unit):
            score = worker.accuracy(unit, name)
            logger.info("%s: score %s", name, "-" if score is None else f"{score:.2f}")
        if self._untimed(unit):
            times = worker.times(unit, self.timing_n)
            ttft_ms, throughput = times["ttft_ms"], times["throughput"]
            logger.info("%s: %.1f ms to a token, %.1f tokens/s", name, ttft_ms, throughput)
        store.beside(unit.path, "failed.json").unlink(missing_ok=True)
        logger.info("%s: took %s", name, duration(time.monotonic() - started))

    def _fail(self, unit: Unit, error: Exception) -> None:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        self.failures[unit.path] = reason
        logger.error("%s %s: failed: %s", unit.row.id, unit.task, reason)
        record = {
            "error": reason,
            "traceback": "".join(traceback.format_exception(error)),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        try:
            store.write_json_atomic(store.beside(unit.path, "failed.json"), record)
        except OSError as full:
            logger.error("the failure could not be recorded: %s", full)


@contextmanager
def _signals() -> Iterator[None]:
    """End cleanly on what a batch system sends before it kills."""

    def stop(number: int, _: Any) -> None:
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
