"""The units one process works on; others may work on the same folder at the same time."""

from __future__ import annotations

import logging
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.plan.units import Unit
from eval.results import records, store
from eval.results.agree import agreed
from eval.results.records import Failure, RecordError, Timing
from eval.results.shelf import Shelf, State
from eval.run import preflight
from eval.run.engine import Engine, EngineNotStarted
from eval.run.estimate import summary
from eval.run.progress import duration
from eval.run.ranks import Rank, own_rank
from eval.run.timing import RowFailed

if TYPE_CHECKING:
    from eval.run.worker import Worker
    from llava_hivtp.zero3 import Team

logger = logging.getLogger(__name__)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


class Stopped(BaseException):
    """A signal asked the process to end: no failure of the unit in work."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


@dataclass
class Job:
    """What one process was asked to do."""

    shelf: Shelf
    data: Path
    batch: int | Callable[[Any], int] = 1  # or what finds it for the loaded model
    timing_n: int = 0  # requests to time per unit; 0: no timing pass
    arguments: dict[str, Any] = field(default_factory=dict)  # of the model
    engine: Engine | None = None  # answers instead of a model in this process; never timed
    started: float = field(default_factory=time.time)
    failures: dict[Path, str] = field(default_factory=dict)  # this process's, disk full or not

    def run(self) -> int:
        """Do what is left of the units; returns how many of them failed.

        Raises:
            ValueError: for what would fail later, before any weights are read.
            Stopped: on a signal; the files are such that the next run goes on from there.
        """
        with _signals():
            return self._run()

    def _run(self) -> int:
        units = self.shelf.units
        states = [(unit, self._sound(unit)) for unit in units]
        left = [unit for unit, state in states if self._left(state)]
        logger.info("%d of %d units are done", len(units) - len(left), len(units))
        if left:
            for line in summary(self.shelf, {u.path: s for u, s in states}, self.timing_n):
                logger.info("%s", line)
            preflight.check(self.shelf, left, self.data, self.arguments, self.engine)
            left.sort(key=lambda unit: store.beside(unit.path, "failed.json").exists())  # last
            with own_rank(bool(self.arguments.get("zero3"))) as rank:
                if rank.team and rank.index:
                    logger.setLevel(logging.WARNING)
                with closing(self._load()) as worker:
                    self._agree(worker)
                    in_step = self._answer(worker, rank, rank.order(left))
                if in_step:
                    if self.timing_n:
                        worker = worker if self.engine is None else self._load_timed()
                        for task in rank.order(self.shelf.tasks):
                            self._time(worker, [unit for unit in left if unit.task == task])
                    rank.wait()
        for unit in units:
            if self.shelf.state(unit).kind == "done":
                store.tidy(unit.path)
        return self._report()

    def _report(self) -> int:
        """Say what failed, once, at the end; returns how many units."""
        failed = [unit for unit in self.shelf.units if self._failed(unit)]
        for unit in failed:
            record = records.read_failure(unit.path)
            reason = self.failures.get(unit.path) or (record.error if record else "")
            logger.error("failed: %s %s: %s", unit.row.id, unit.task, reason)
        if failed:
            logger.error("%d of %d units failed", len(failed), len(self.shelf.units))
        return len(failed)

    def _sound(self, unit: Unit) -> State:
        """The state of a unit; damaged files are an error."""
        state = self.shelf.state(unit)
        if state.kind == "damaged":
            raise RecordError(state.reason)
        return state

    def _left(self, state: State) -> bool:
        return not state.answered or (bool(self.timing_n) and not state.timed)

    def _failed(self, unit: Unit) -> bool:
        """Whether a unit failed since this job began, here or in another process."""
        record = store.beside(unit.path, "failed.json")
        recorded = record.exists() and record.stat().st_mtime >= self.started
        return unit.path in self.failures or recorded

    def _load(self) -> Worker:
        from eval.run.worker import Worker

        return Worker(self.shelf, self.batch, self.data, self.arguments, self.engine)

    def _load_timed(self) -> Worker:
        """The model in this process, for the times of answers that an engine gave."""
        from eval.run.worker import Worker

        return Worker(self.shelf, 1, self.data, self.arguments)

    def _agree(self, worker: Worker) -> None:
        """Refuse to add to results that no table could show beside the new ones."""
        found: dict[str, dict[str, Any]] = {}
        for unit in self.shelf.units:
            result = self.shelf.result(unit)
            if result is not None:
                found.setdefault(unit.row.id, {})[unit.task] = result.protocol
        tasks = {task for row in found.values() for task in row}
        agreed("stored", {**found, "this run": {t: worker.accuracy_protocol(t) for t in tasks}})

    def _answer(self, worker: Worker, rank: Rank, units: Sequence[Unit]) -> bool:
        """Answer the units, what others hold last; False if a team is out of step.

        Two processes that go through one list meet at every unit: only at the end does one wait a
        moment, for somebody like `status` who holds a lock no longer.
        """
        for patience_s in (0.0, store.PATIENCE_S):
            left = []
            for unit in units:
                if not self._try(worker, unit, patience_s):
                    left.append(unit)
                if rank.team and self.failures:
                    return False  # the launcher ends the others
            units = left
        return True

    def _try(self, worker: Worker, unit: Unit, patience_s: float) -> bool:
        """Answer a unit if it is to be had; whether it was."""
        try:
            with self._claimed(unit, worker.lm.team, patience_s) as ours:
                if ours:
                    self._do(worker, unit)
                return ours
        except EngineNotStarted:
            raise
        except Exception as error:
            self._fail(unit, error)
            return True

    @contextmanager
    def _claimed(self, unit: Unit, team: Team, patience_s: float) -> Iterator[bool]:
        """Hold a unit that is to be answered: yields what the first process of the team finds."""
        if team.index:
            yield team.exchange(False)[0]
            return
        with store.locked(unit.path, patience_s) as ours:
            ours = ours and not self._failed(unit) and not self.shelf.state(unit).answered
            yield team.exchange(ours)[0]

    def _do(self, worker: Worker, unit: Unit) -> None:
        name, started = f"{unit.row.id} {unit.task}", time.monotonic()
        score = worker.accuracy(unit, name)
        logger.info("%s: score %s", name, "-" if score is None else f"{score:.2f}")
        store.beside(unit.path, "failed.json").unlink(missing_ok=True)
        logger.info("%s: took %s", name, duration(time.monotonic() - started))

    def _time(self, worker: Worker, units: Sequence[Unit]) -> None:
        """Time all rows of a task in turn that are answered, untimed and held by nobody else."""
        with ExitStack() as held:
            ours = [
                unit
                for unit in units
                if self._untimed(unit)
                and held.enter_context(store.locked(unit.path))
                and self._untimed(unit)  # still, now that nobody else holds it
            ]
            while ours:
                try:
                    self._say(ours, worker.times(ours, self.timing_n))
                    return
                except RowFailed as failed:
                    self._fail(ours.pop(failed.key), failed.__cause__)
                except Exception as error:  # no row's fault
                    for unit in ours:
                        self._fail(unit, error)
                    return

    def _untimed(self, unit: Unit) -> bool:
        state = self.shelf.state(unit)
        return state.answered and not state.timed and not self._failed(unit)

    def _say(self, units: Sequence[Unit], times: Sequence[Timing]) -> None:
        for unit, found in zip(units, times, strict=True):
            store.beside(unit.path, "failed.json").unlink(missing_ok=True)
            name = f"{unit.row.id} {unit.task}"
            logger.info(
                "%s: %.1f ms to a token, %.1f tokens/s", name, found.ttft_ms, found.throughput
            )
        for warning in sorted({w for found in times for w in found.warnings or ()}):
            logger.warning("these times are doubtful: %s", warning)

    def _fail(self, unit: Unit, error: Exception) -> None:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        self.failures[unit.path] = reason
        logger.error("%s %s: failed: %s", unit.row.id, unit.task, reason)
        record = Failure(
            reason,
            "".join(traceback.format_exception(error)),
            datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )
        try:
            records.write_failure(unit.path, record)
        except OSError as full:
            logger.error("the failure could not be recorded: %s", full)


@contextmanager
def _signals() -> Iterator[None]:
    """End cleanly on Ctrl-C, a closed terminal, and what a batch system sends before it kills."""

    def stop(number: int, _: Any) -> None:
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
