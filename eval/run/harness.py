"""lmms-eval's own tasks, one at a time: their requests, their scores, their samples."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from eval.benchmarks import data
from eval.benchmarks.records import BENCHMARKS
from eval.results.records import Sample

if TYPE_CHECKING:
    from lmms_eval.api.instance import Instance
    from lmms_eval.api.task import Task

    from llava_hivtp.answer import Answer
    from llava_hivtp.lmms import LlavaHIVTP

OWN_TASKS = Path(data.__file__).parent / "tasks"  # which lmms-eval does not have


@functools.cache
def _manager() -> Any:
    from lmms_eval.tasks import TaskManager

    folders = [str(folder) for folder in _folders()]
    return TaskManager("WARNING", folders, include_defaults=False, model_name="llava_hivtp")


def _folders() -> list[Path]:
    """Where lmms-eval keeps the benchmarks' tasks; to read its 3,300 YAML files takes seconds."""
    from lmms_eval import tasks

    names = b"|".join(re.escape(task.encode()) for task in BENCHMARKS)
    named = re.compile(rb"^task:\s*[\"']?(?:%s)[\"']?\s*(?:#.*)?$" % names, re.MULTILINE)
    files = Path(tasks.__file__).parent.rglob("*.yaml")
    return sorted({file.parent for file in files if named.search(file.read_bytes())} | {OWN_TASKS})


def metric_names(name: str) -> set[str]:
    """Keys of what lmms-eval measures in a task, `metric,filter`; reads its YAML, no data.

    Raises:
        ValueError: if lmms-eval has no such task.
    """
    from lmms_eval.utils import load_yaml_config

    index = _manager().task_index
    if name not in index:
        raise ValueError(f"lmms-eval has no task {name}")
    config = load_yaml_config(index[name]["yaml_path"], mode="simple")
    filters = [each["name"] for each in config.get("filter_list") or [{"name": "none"}]]
    metrics = [each["metric"] for each in config.get("metric_list") or []]
    return {f"{metric},{each}" for metric in metrics for each in filters}


def load_task(name: str, folder: Path) -> Task:
    """A task with its data out of a data folder, nothing counted yet.

    Every load runs the task's own modules anew: OCRBench counts in a global of its module.
    """
    from lmms_eval.tasks import get_task_dict
    from tenacity import RetryError

    from eval.run.tasks import ReadOnceTask
    from llava_hivtp.images import whole_files

    digest, manager = data.digest(folder, name), _manager()
    own = {"model_name": manager.model_name, "only": BENCHMARKS[name].only}
    config = {"task": name, "class": ReadOnceTask, "state": (str(folder), digest), **own}
    try:
        with (
            _inside(folder),
            _own_cache(digest),
            whole_files(),
            contextlib.redirect_stdout(io.StringIO()),  # RefCOCO says how many rows it makes
        ):
            task = get_task_dict([config], manager, "simple")[name]
    except RetryError as error:  # says nothing; what it retried does
        raise error.last_attempt.exception() from error
    # Files for leaderboards: unread here, and MMBench's breaks on a control character.
    task.aggregation().pop("submission", None)
    return task


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """lmms-eval's tasks find their data by names relative to the current folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _own_cache(digest: str) -> Iterator[None]:
    """A cache for this data alone: `datasets` tells two files of one relative name not apart."""
    import datasets
    from lmms_eval.api import task

    name, chosen = "LMMS_EVAL_DATASETS_CACHE", task._resolve_hf_datasets_cache_dir
    given, before = os.environ.get(name), datasets.config.HF_DATASETS_CACHE
    own = Path(chosen()) / f"llava_hivtp-{digest}"  # beside what lmms-eval finds fit for locks
    os.environ[name] = str(own)
    datasets.config.HF_DATASETS_CACHE = own  # for GQA, which loads its images itself
    chosen.cache_clear()
    try:
        yield
    finally:
        datasets.config.HF_DATASETS_CACHE = before
        del os.environ[name]
        if given is not None:
            os.environ[name] = given
        chosen.cache_clear()


def evaluate(lm: LlavaHIVTP, task: Task, limit: int | None) -> dict[str, Any]:
    """lmms-eval's results of one task, samples included; its own prints are dropped."""
    from lmms_eval.evaluator import simple_evaluate
    from tenacity import RetryError

    lm.task_dict.clear()
    said = io.StringIO()
    with (
        TemporaryDirectory() as scratch,
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),  # a bar that cannot be switched off
    ):
        settings = SimpleNamespace(
            output_path=scratch, process_with_media=False, reasoning_tags=None
        )
        try:
            return simple_evaluate(
                lm,
                tasks=[task],
                limit=limit,
                bootstrap_iters=0,
                distributed_executor_backend="torchrun",  # no Accelerator: one process per unit
                task_manager=_manager(),
                cli_args=settings,
            )
        except RetryError as error:
            raise error.last_attempt.exception() from error


def requests(lm: LlavaHIVTP, task: Task, count: int) -> list[Instance]:
    """The first requests of a task, not evaluated."""
    lm.task_dict.clear()
    lm.task_dict[task.config.task] = task.dataset
    if task.config.num_fewshot is None:
        task.set_config("num_fewshot", 0)
    task.build_all_requests(limit=count, rank=0, world_size=1)
    return task.instances


def metrics(results: Mapping[str, Any], name: str) -> dict[str, float]:
    """The finite numbers lmms-eval gives for a task."""
    found = results["results"][name]
    numbers = {k: float(v) for k, v in found.items() if isinstance(v, (int, float))}
    return {key: value for key, value in numbers.items() if math.isfinite(value)}


def samples(
    results: Mapping[str, Any], name: str, answers: Mapping[tuple[str, int], Answer]
) -> list[Sample]:
    """One per document: answer, score in the task's own terms, what it clusters with."""
    benchmark, found = BENCHMARKS[name], []
    for sample in results["samples"][name]:
        answer = answers[name, sample["doc_id"]]
        found.append(
            Sample(
                doc_id=sample["doc_id"],
                answer=answer.text,
                score=benchmark.scored(sample),
                group=benchmark.grouped(sample),
                patches=answer.patches,
                newlines=answer.newlines,
                total=answer.total,
                generated=answer.generated,
                stratum=benchmark.stratum(sample["doc"]) if benchmark.stratum else "",
                mean_per_layer=answer.mean_per_layer,
            )
        )
    return found
