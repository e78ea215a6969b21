"""The same questions in process and through vLLM: answers that differ, and wall time of both."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from eval import ROOT
from eval.benchmarks.records import BENCHMARKS
from eval.machine import commit, device_name, version
from eval.markdown import pipes
from eval.plan.table import load_table
from eval.plan.units import Unit
from eval.results.records import Sample
from eval.results.shelf import Shelf

CONFIG = ROOT / "configs" / "nano" / "served.yaml"
ALONE, BATCHED, ENGINE = "in process, 1", "in process, {}", "vLLM, {}"
EAGER = "--enforce-eager --kv-cache-memory-bytes 268435456"  # a model this small gains by no more


def measure(out: Path, batch: int, engine_args: str = EAGER) -> str:
    """Run what is missing of the table three times over, and compare; returns Markdown.

    The same call goes on after a stop, as `eval run` does.
    """
    model, data = out / "hf" / "nodrop", out / "data"
    if not (model / "processor_config.json").is_file():
        _call("eval.nano", "convert", "--out", str(out / "hf"))
    _call("eval.nano", "data", "--out", str(data))
    ways = {
        ALONE: ["--batch", "1"],
        BATCHED.format(batch): ["--batch", str(batch)],
        ENGINE.format(batch): ["--batch", str(batch), "--engine", "vllm"],
    }
    ways[ENGINE.format(batch)] += ["--engine-args", engine_args]
    shelves = {}
    for name, options in ways.items():
        place = out / name.replace(", ", "-").replace(" ", "-")
        given = ["--model", str(model), "--data", str(data), "--out", str(place)]
        _call("eval", "run", str(CONFIG), *given, "--no-timing", *options)
        shelves[name] = Shelf(load_table(CONFIG, str(model)), place)
    return _report(shelves, engine_args)


def flips(ours: Sequence[Sample], theirs: Sequence[Sample]) -> int:
    """How many documents got another answer."""
    pairs = zip(ours, theirs, strict=True)
    return sum((a.doc_id, a.answer) != (b.doc_id, b.answer) for a, b in pairs)


def _call(module: str, *arguments: str) -> None:
    path = os.pathsep.join(p for p in (str(ROOT), os.getenv("PYTHONPATH")) if p)
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # the machine may be shared
    subprocess.run([sys.executable, "-m", module, *arguments], check=True, env=environment)


def _report(shelves: dict[str, Shelf], engine_args: str) -> str:
    first = next(iter(shelves.values()))
    last = [*shelves.values()][-1]
    engine = last.result(_own(first.units[0], last)).protocol["engine"]
    rows = [
        ["row", "set", "questions", *(f"score {name}" for name in shelves)]
        + [f"other answers than alone: {name}" for name in [*shelves][1:]]
        + [f"s {name}" for name in shelves]
    ]
    rows += [_line(unit, shelves) for unit in first.units]
    rows.append(_sums(rows[1:], len(shelves)))
    return (
        f"## The embedded model in process and through {engine}\n\n"
        f"All quick sets, greedy; the number behind a way is how many requests it has at a time. "
        f"Seconds are wall time of a unit from loading its task to its stored result; the first "
        f"unit of a row starts its engine, which is in them. `{engine_args}`.\n\n"
        f"{device_name()}, {os.cpu_count()} cores, OMP_NUM_THREADS=1; load over the last 15 "
        f"minutes {os.getloadavg()[2]:.1f}; torch {version('torch')}, transformers "
        f"{version('transformers')}; commit {commit()}\n\n{pipes(rows, 2)}\n"
    )


def _line(unit: Unit, shelves: dict[str, Shelf]) -> list[str]:
    found = [(s.result(own), s.samples(own)) for s in shelves.values() for own in [_own(unit, s)]]
    scores = [f"{result.score:.2f}" for result, _ in found]
    others = [str(flips(samples, found[0][1])) for _, samples in found[1:]]
    seconds = [f"{result.seconds:.0f}" for result, _ in found]
    column = BENCHMARKS[unit.task].column
    return [unit.row.id, column, str(found[0][0].requests), *scores, *others, *seconds]


def _own(unit: Unit, shelf: Shelf) -> Unit:
    return shelf.unit(unit.row, unit.task)


def _sums(lines: list[list[str]], ways: int) -> list[str]:
    """Questions, other answers and seconds of all units; scores of several sets have no sum."""
    sums = [sum(float(line[i]) for line in lines) for i in range(2, len(lines[0]))]
    texts = [f"{each:.0f}" for each in sums]
    return ["all", "", texts[0], *[""] * ways, *texts[1 + ways :]]
