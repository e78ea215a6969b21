"""What preparing ahead brings: requests per second beside the best that device and workers allow.

    python scripts/pipeline.py --out eval/measured/pipeline

First a device of fixed speed: the plug-in's own `generate_until` with the journal of `run`, on
AnyRes images read from JPEG, with a model whose `generate` sleeps D ms per request. Then the
embedded models on the same cores as the workers, with memory. Cases already in the .csv are not
done again. On a machine that others use, `--first` goes before everybody else (nice -20 for its
session, which takes root).
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from eval import machine  # noqa: E402
from eval.efficiency.report import write_csv  # noqa: E402
from eval.markdown import pipes  # noqa: E402
from eval.plan.table import load_table  # noqa: E402
from llava_hivtp.ahead import made_ahead  # noqa: E402

DEVICES_MS, WORKERS = (5, 10, 20, 50, 100), (1, 2)
SIZE, DOCUMENTS, ROUNDS, SECONDS = (640, 480), 64, 3, 3.0
MODELS = {"flat": ("table1", "small"), "AnyRes": ("table2", "large")}
TASK, BATCH, REPEATS = "gqa", 8, (1, 4)  # 40 questions to an embedded model, so many times over


def main() -> None:
    """Do the cases that are left, write .csv and .md."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results/pipeline"))
    parser.add_argument("--first", action="store_true")
    parser.add_argument("--case", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        if options.first:  # sessions share the CPU first, processes only within their own
            os.nice(-20)
            Path("/proc/self/autogroup").write_text("-20")
        folder, kind, *numbers = options.case
        case = fixed_case if kind == "fixed" else embedded_case
        print(json.dumps(case(Path(folder), kind, *map(int, numbers))))
        return
    path = options.out.with_name(options.out.name + ".csv")
    rows = list(csv.DictReader(path.open())) if path.is_file() else []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases():
            if not any(row["case"] == case for row in rows):
                rows.append({"case": case} | run(folder, case, options.first))
                write_csv(path, rows)
    text = report(rows, options.first)
    options.out.with_name(options.out.name + ".md").write_text(text)
    print(text)


def cases() -> Iterator[str]:
    """Each runs in a process of its own."""
    yield from (f"fixed {ms} {workers}" for ms in DEVICES_MS for workers in WORKERS)
    for kind in MODELS:
        yield from (f"{kind} {n} {workers}" for workers in (0, *WORKERS) for n in REPEATS)


def run(folder: str, case: str, first: bool) -> dict[str, str]:
    """A case as a process, and what it found."""
    command = [sys.executable, __file__, "--case", folder, *case.split()]
    done = subprocess.run(
        [*command, *(["--first"] if first else [])],
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1]) | {"commit": machine.commit()}


def fixed_case(folder: Path, _: str, device_ms: int, workers: int) -> dict[str, str]:
    """A device of `device_ms` per request, and where the time of a request goes.

    Preparing, sleeping and the workers alone are measured anew in every round: a shared machine is
    not equally fast for minutes.
    """
    from eval.run.journal import Journal
    from eval.untrained.random_llava import random_llava
    from llava_hivtp.lmms import LlavaHIVTP

    checkpoint = folder / "llava"
    if not (checkpoint / "config.json").is_file():
        random_llava(checkpoint, anyres=True, encoder_layers=3)
    lm = LlavaHIVTP(str(checkpoint), workers=workers, device_map="cpu")
    requests = documents(lm)
    lm.answer([lm.read(requests[0])])
    kept, answer_all = lm.model.kept, lm._answer_all
    slept: list[float] = []
    answered: list[float] = []

    def generate(ids: Any, **_: Any) -> Any:
        slept.append(sleep_seconds(device_ms))
        lm.model.kept = kept
        return ids[:, :1] * 0 + lm.tokenizer.eos_token_id

    def answer(prepared: Any) -> Any:
        began = time.perf_counter()
        answers = answer_all(prepared)
        answered.append(time.perf_counter() - began)
        return answers

    lm.model.generate, lm._answer_all = generate, answer
    rounds = []
    for turn in range(ROUNDS):
        alone = prepare_seconds(lm, requests)
        device = median(sleep_seconds(device_ms) for _ in range(50))
        ideal = min(1 / device, workers / alone)
        count = int(SECONDS * ideal) + 1
        slept.clear(), answered.clear()
        lm.journal = Journal(folder / f"{device_ms}-{workers}-{turn}.jsonl", "")
        whole = seconds(lm, [requests[i % DOCUMENTS] for i in range(count)]) / count
        lm.journal.close()
        late, own = mean(slept) - device, mean(answered) - mean(slept)
        between = whole - mean(answered)
        took = {"prepare": alone, "device": device, "late": late, "own": own, "between": between}
        took["workers"] = workers_seconds(lm, requests)
        rounds.append({"rate": 1 / whole, "ideal": ideal, "share": 1 / whole / ideal} | took)
    middle = {name: median(each[name] for each in rounds) for name in rounds[0]}
    times = {f"{name}_ms": f"{1e3 * middle[name]:.2f}" for name in took}
    shares = {"share": f"{middle['share']:.3f}", "requests": str(count)}
    return found([each["rate"] for each in rounds], middle["ideal"]) | times | shares


def sleep_seconds(ms: float) -> float:
    """How long a sleep of so many milliseconds takes."""
    began = time.perf_counter()
    time.sleep(ms / 1e3)
    return time.perf_counter() - began


def documents(lm: Any) -> list[Any]:
    """Questions about JPEGs in an arrow table, as lmms-eval holds them."""
    import datasets
    from lmms_eval.api.instance import Instance

    from eval.efficiency.inputs import random_picture

    buffer = io.BytesIO()
    random_picture(SIZE).save(buffer, "jpeg", quality=90)
    stored = {"image": [{"bytes": buffer.getvalue(), "path": None}] * DOCUMENTS}
    split = datasets.Dataset.from_dict(stored).cast_column("image", datasets.Image())
    lm.task_dict["drawn"] = {"test": split}

    def visual(document: dict[str, Any]) -> list[Any]:
        return [document["image"].convert("RGB")]

    return [
        Instance(
            request_type="generate_until",
            arguments=(f"What is number {i}?", {"max_new_tokens": 1}, visual, i, "drawn", "test"),
            idx=0,
            metadata={"task": "drawn", "doc_id": i, "repeats": 1},
        )
        for i in range(DOCUMENTS)
    ]


def prepare_seconds(lm: Any, requests: Sequence[Any]) -> float:
    """CPU seconds to read and prepare a request with nothing beside it, the median."""
    taken = []
    for i in range(len(requests)):
        began = time.thread_time()
        lm._prepare_all([lm.ready(i, requests)])
        taken.append(time.thread_time() - began)
    return median(taken)


def workers_seconds(lm: Any, requests: Sequence[Any]) -> float:
    """Per request, of the workers with nobody to wait for and nothing beside them."""

    def prepare(i: int) -> Any:
        return lm._prepare_all([lm.ready(i, requests)])

    began = time.perf_counter()
    with made_ahead(prepare, range(len(requests)), lm.workers) as ready:
        for _ in ready:
            pass
    return (time.perf_counter() - began) / len(requests)


def embedded_case(folder: Path, kind: str, repeats: int, workers: int) -> dict[str, str]:
    """An embedded model on the CPU, whose forward uses a core itself."""
    from eval.nano.datasets import write
    from eval.run import harness
    from llava_hivtp.lmms import LlavaHIVTP

    name, images = MODELS[kind]
    model = ROOT / load_table(ROOT / f"configs/nano/{name}.yaml").model
    lm = LlavaHIVTP(str(model), workers=workers, device_map="cpu", batch_size=BATCH)
    task = harness.load_task(TASK, write(folder / images, "quick", images))
    asked = harness.requests(lm, task, 10**6) * repeats
    lm.generate_until(asked[:BATCH])
    before = memory_mb()
    alone = prepare_seconds(lm, asked[: len(asked) // repeats])
    taken: list[float] = []
    answer_all = lm._answer_all

    def answer(prepared: Any) -> Any:
        began = time.thread_time()
        answers = answer_all(prepared)
        taken.append(time.thread_time() - began)
        return answers

    lm._answer_all = answer
    rates = [len(asked) / seconds(lm, asked) for _ in range(ROUNDS)]
    device = sum(taken) / ROUNDS / len(asked)
    ideal = min(1 / device, workers / alone) if workers else 1 / (device + alone)
    ideal = min(ideal, 2 / (device + alone))  # two cores do all of the work
    return found(rates, ideal) | {
        "prepare_ms": f"{1e3 * alone:.2f}",
        "device_ms": f"{1e3 * device:.2f}",
        "requests": str(len(asked)),
        "peak_mb": f"{memory_mb():.0f}",
        "loaded_mb": f"{before:.0f}",
    }


def seconds(lm: Any, requests: list[Any]) -> float:
    """Of answering them all."""
    began = time.perf_counter()
    lm.generate_until(requests)
    return time.perf_counter() - began


def memory_mb() -> float:
    """The most this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def found(rates: Sequence[float], ideal: float) -> dict[str, str]:
    """Median, least and most of the rounds."""
    shown = {"rate": median(rates), "least": min(rates), "most": max(rates), "ideal": ideal}
    return {name: f"{value:.2f}" for name, value in shown.items()}


def report(rows: Sequence[dict[str, str]], first: bool) -> str:
    """Two tables."""
    fixed = [["device, ms", "workers", "preparing, ms", "requests/s", "ideal", "of the ideal"]]
    fixed[0] += ["device late, ms", "answering, ms", "between, ms"]
    fixed[0] += ["workers alone, ms a request"]
    nano = [["model", "workers", "requests", "preparing, ms", "answering, ms", "requests/s"]]
    nano[0] += ["ideal", "of the ideal", "MB before", "peak MB"]
    for row in rows:
        kind, number, workers = row["case"].split()
        rate = f"{row['rate']} ({row['least']}-{row['most']})"
        share = float(row.get("share") or float(row["rate"]) / float(row["ideal"]))
        ideal = [row["ideal"], f"{share:.2f}"]
        if kind == "fixed":
            parts = [row[f"{part}_ms"] for part in ("late", "own", "between", "workers")]
            fixed.append([number, workers, row["prepare_ms"], rate, *ideal, *parts])
        else:
            times = [row["prepare_ms"], row["device_ms"], rate]
            memory = [row["loaded_mb"], row["peak_mb"]]
            nano.append([kind, workers, row["requests"], *times, *ideal, *memory])
    priority = "; at nice -20, since others use this machine" * first
    size = "x".join(map(str, SIZE))
    return (
        f"`python scripts/pipeline.py{' --first' * first}`: medians (least-most) of {ROUNDS} rounds"
        f"{priority}. {machine.device_name()}, {os.cpu_count()} cores, torch "
        f"{machine.version('torch')}, pillow {machine.version('pillow')}, "
        f"commits {', '.join(sorted({row['commit'] for row in rows}))}.\n\n"
        f"A device of fixed speed, which uses no CPU: {size} JPEGs cut into five tiles, batch 1, "
        "every answer journaled. The ideal is min(1/device, workers/preparing): the device's sleep "
        "as it is with nothing beside it, and preparing (reading included) as CPU time of one "
        "thread alone, both of the same round. Per request: how much longer the device slept, what "
        "the host did around it, and what it waited for the next image or the journal. Workers "
        "alone: the same threads with no device to wait for, on the same cores and caches."
        f"\n\n{pipes(fixed, left=0)}\n\n"
        f"The embedded models, one thread each for model and workers, batch {BATCH}, {TASK}. "
        "Answering uses the CPU, too: the ideal is the least of 1/answering, workers/preparing and "
        f"two cores for the sum of both; without workers one core.\n\n{pipes(nano, left=1)}\n"
    )


if __name__ == "__main__":
    main()
