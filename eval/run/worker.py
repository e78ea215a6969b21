"""One process's model, and what it does for a unit: answers and score, then times."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.benchmarks import data
from eval.benchmarks.records import BENCHMARKS
from eval.digests import text_digest
from eval.machine import provenance, version
from eval.plan.serving import overrides
from eval.plan.units import Unit
from eval.results import records, store
from eval.results.agree import BATCH
from eval.results.records import Result, Sample, Timing, Tokens
from eval.results.shelf import Shelf
from eval.results.sources import Sources
from eval.run import harness as official
from eval.run import timing
from eval.run.journal import Journal
from eval.run.progress import Progress

if TYPE_CHECKING:
    from eval.plan.table import Row, Table
    from eval.run.engine import Engine
    from eval.run.served import Served
    from llava_hivtp.lmms import LlavaHIVTP

logger = logging.getLogger(__name__)
FOR_ENGINE = ("dtype", "max_side", "max_aspect")  # others are the in-process model's


class Worker:
    """Holds a model loaded once; `accuracy` and `times` write the files of a unit."""

    def __init__(
        self,
        shelf: Shelf,
        batch: int | Callable[[Any], int],
        folder: Path,
        arguments: dict[str, Any],
        engine: Engine | None = None,
    ) -> None:
        """Load the checkpoint, or prepare to serve it.

        Args:
            shelf: the table, of one checkpoint, and its results.
            batch: requests at a time; one that is found for the loaded model is halved where memory
                runs out.
            folder: of the data.
            arguments: extra model_args; an engine takes those in `FOR_ENGINE`.
            engine: answers instead of a model in this process, and gives no times.
        """
        model, layout, positions = shelf.table.model, shelf.table.layout, shelf.table.positions
        self.engine = engine
        self.folder, self.code, self.patches = folder, shelf.code, shelf.table.patches
        self.lm: LlavaHIVTP | Served = self._model(shelf.table, arguments)
        self.lm.shrinks = callable(batch)
        self.lm.batch_size = batch(self.lm.model) if callable(batch) else batch
        if callable(batch):
            logger.info("batch %d by the memory that is free", self.lm.batch_size)
        self.protocol = {  # of both passes
            "checkpoint": Path(model).name,
            "checkpoint digest": shelf.checkpoint,
            "conversation template": self.lm.conv_template,
            "AnyRes layout": layout,
            "dtype": str(self.lm.model.dtype).removeprefix("torch."),
            "attention": arguments.get("attn_implementation", "sdpa"),
            "quantization": arguments.get("quantization", "none"),
            "image processor": type(self.lm.image_processor).__name__,
        }
        if engine is not None:
            self.protocol |= {"attention": "the engine's", "engine": engine.version()}
            self.protocol["engine's arguments"] = " ".join(engine.arguments)
        if positions != "packed":  # named where it is not LLaVA's own way, as in earlier results
            self.protocol["positions"] = positions

    def _model(self, table: Table, arguments: dict[str, Any]) -> LlavaHIVTP | Served:
        if self.engine is not None:
            from eval.run.served import Served

            given = {name: arguments[name] for name in FOR_ENGINE if name in arguments}
            return Served(table.model, self.engine, table.layout, **given)
        from llava_hivtp.lmms import LlavaHIVTP

        return LlavaHIVTP(table.model, layout=table.layout, positions=table.positions, **arguments)

    def close(self) -> None:
        """End the engine, if there is one."""
        if self.engine is not None:
            self.lm.close()

    def accuracy(self, unit: Unit, label: str) -> float | None:
        """Answer every request of a unit and store score and samples; returns the score.

        Of a team that shares the requests, the first process stores.
        """
        started = time.monotonic()
        self._take(unit)
        task = official.load_task(unit.task, self.folder)
        protocol = self.accuracy_protocol(unit.task)
        protocol["task"]["version"] = _version(task)
        journal = store.beside(unit.path, "journal.jsonl")
        first = self.lm.team.index == 0
        with (
            self._journaled(journal, unit, protocol, label) if first else nullcontext(),
            timing.device_share(self.lm.device, alone=False),
        ):
            results = official.evaluate(self.lm, task, unit.limit)
        samples = official.samples(results, unit.task, self.lm.answers)
        result = self._result(unit, official.metrics(results, unit.task), samples, protocol)
        if first:
            digest = records.write_samples(unit.path, samples)
            seconds = time.monotonic() - started
            records.write_result(unit.path, replace(result, seconds=seconds, samples=digest))
            journal.unlink()
        return result.score

    @contextmanager
    def _journaled(
        self, path: Path, unit: Unit, protocol: dict[str, Any], label: str
    ) -> Iterator[None]:
        """Let the model remember answers and show its progress."""
        journal = Journal(path, self._identity(unit, protocol))
        self.lm.journal = journal
        self.lm.progress = lambda total, done: Progress(label, total, done)
        try:
            yield
        finally:
            self.lm.journal = None
            journal.close()

    def times(self, units: Sequence[Unit], count: int) -> list[Timing]:
        """Time the first requests of a task under its rows in turn; store each row's times.

        Raises:
            RowFailed: if a row fails, with its place in `units` as `key`; nothing is stored then.
        """
        (name,) = {unit.task for unit in units}
        task = official.load_task(name, self.folder)
        limit = units[0].limit
        instances = official.requests(self.lm, task, count if limit is None else min(count, limit))
        pruners = {place: unit.row.build() for place, unit in enumerate(units)}
        with (
            timing.device_share(self.lm.device, alone=True),
            Progress(f"times of {name}", len(units) * len(instances)) as bar,
        ):
            measured = timing.time_rows(self.lm, pruners, instances, bar)
        protocol = self.protocol | {
            "timed requests per task": count,
            "timed at batch size": 1,
            "clock": timing.CLOCK,
        }
        found = []
        for place, unit in enumerate(units):
            code, numbers = self.sources(unit.row), measured[place]
            found.append(Timing(**numbers, protocol=protocol, provenance=provenance(), source=code))
            records.write_timing(unit.path, found[-1])
        return found

    def sources(self, row: Row) -> Sources:
        """What the answers of a row depend on."""
        from llava_hivtp.families import family_of

        if self.engine is not None:
            return self.code.of(row, type(self.lm).__module__)
        return self.code.of(row, family_of(type(self.lm.model)).__module__)

    def _take(self, unit: Unit) -> None:
        self.lm.model.pruner = unit.row.build()
        if self.engine is not None:
            self.lm.hivtp = overrides(unit.row)

    def accuracy_protocol(self, task: str) -> dict[str, Any]:
        """What the scores of a task hang on: equal in all rows of a table."""
        benchmark = BENCHMARKS[task]
        own = {
            "name": task,
            "metric": benchmark.metric,
            "measures": benchmark.measures,
            "data": data.digest(self.folder, task),
        }
        return self.protocol | {
            "lmms-eval": version("lmms_eval"),
            BATCH: "by memory" if self.lm.shrinks else self.lm.batch_size,
            "task": own,
        }

    def _identity(self, unit: Unit, protocol: dict[str, Any]) -> str:
        """All that shapes the unit's answers and is equal between its requests."""
        source = self.sources(unit.row)
        return text_digest(repr((protocol, unit.row.pruner, unit.row.arguments, source)))

    def _result(
        self,
        unit: Unit,
        metrics: dict[str, float],
        samples: Sequence[Sample],
        protocol: dict[str, Any],
    ) -> Result:
        benchmark = BENCHMARKS[unit.task]
        score, calibration = metrics.get(benchmark.metric), unit.row.calibration
        return Result(
            unit={
                "model": unit.model,
                "row": unit.row.id,
                "pruner": unit.row.pruner,
                "arguments": unit.row.arguments,
                "layout": unit.row.layout,
                "task": unit.task,
                "limit": unit.limit,
                **({"calibrated": asdict(calibration)} if calibration else {}),
            },
            score=None if score is None else score * benchmark.scale,
            metrics=metrics,
            requests=len(samples),
            tokens=_tokens(samples),
            protocol=protocol,
            provenance=provenance() | ({BATCH: self.lm.batch_size} if self.lm.shrinks else {}),
            seconds=0.0,
            source=self.sources(unit.row),
        )


def _tokens(samples: Sequence[Sample]) -> Tokens:
    """Means over the requests."""
    counts = ("patches", "newlines", "total", "generated")
    means = {name: sum(getattr(s, name) for s in samples) / len(samples) for name in counts}
    layers = [s.patches if s.mean_per_layer is None else s.mean_per_layer for s in samples]
    drops = any(s.mean_per_layer is not None for s in samples)
    return Tokens(**means, mean_per_layer=sum(layers) / len(layers) if drops else None)


def _version(task: Any) -> str:
    """What a task's YAML says under `metadata`, where anything may stand."""
    found = task.dump_config().get("metadata") or []
    entries = found if isinstance(found, list) else [found]
    return ", ".join(str(e.get("version", e)) if isinstance(e, dict) else str(e) for e in entries)
