"""Tune the embedded model under HIVTP with LLaVA's own trainer, and ask it before and after."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eval import ROOT
from eval.machine import commit, device_name
from eval.markdown import pipes
from eval.nano import EMBEDDED
from eval.nano.language import draw_kind
from eval.nano.questions import ask
from eval.nano.summary import scored
from eval.nano.text import prompts
from eval.plan.table import load_table, one_row, select_rows
from eval.results.means import Scored, difference, in_percent, mean
from eval.results.shelf import Shelf

CONFIG = ROOT / "configs" / "nano" / "tuned.yaml"
QUESTIONS = 3  # about one picture, each a conversation of its own, as the data sets ask
HOW = {
    "projector": ("--tune_mm_mlp_adapter", "True", "--learning_rate", "5e-4"),
    "lora": ("--lora_enable", "True", "--lora_r", "16", "--lora_alpha", "32")
    + ("--learning_rate", "5e-4", "--mm_projector_lr", "5e-4"),
}  # fmt: skip


@dataclass(frozen=True)
class Tuning:
    """What to train on and how long; tests make it small."""

    out: Path
    trainer: Path  # the Python that LLaVA's trainer runs in
    pictures: int
    batch: int = 32
    size: str = "quick"

    @property
    def rows(self) -> tuple[str, ...]:
        """Ids of the pruned rows, one training each and way."""
        return tuple(row.id for row in load_table(CONFIG).rows if row.pruner != "none")

    def model(self, how: str, row: str) -> Path:
        """The merged checkpoint of a training."""
        return self.out / "models" / f"{how}-{row}"


def run_tuning(tuning: Tuning) -> str:
    """Draw, train, merge, ask and compare; whatever is done already is kept. Returns the report."""
    from eval.nano.datasets import write

    conversations(tuning.out / "training", tuning.pictures)
    data = write(tuning.out / "data", tuning.size)
    _ask(tuning, EMBEDDED, data, ("full", *tuning.rows))
    for row in tuning.rows:
        for how in HOW:
            _train(tuning, how, row)
            _ask(tuning, tuning.model(how, row), data, ("full", row))
    return report(tuning)


def conversations(out: Path, pictures: int) -> Path:
    """Write drawn pictures and questions about them as LLaVA has its data; kept if it is there."""
    done = out / "data.json"
    if done.is_file():
        return done
    out.mkdir(parents=True, exist_ok=True)
    rng, samples = random.Random("tuning"), []
    for number in range(pictures):
        kind, picture = draw_kind(rng)
        picture.image.save(out / f"{number}.png", compress_level=1)
        for question in ask(rng, picture, kind, QUESTIONS):
            turns = [
                {"from": "human", "value": f"<image>\n{rng.choice(prompts(question))}"},
                {"from": "gpt", "value": question.answer},
            ]
            name = f"{number}-{len(samples)}"
            samples.append({"id": name, "image": f"{number}.png", "conversations": turns})
    part = done.with_suffix(".part")
    part.write_text(json.dumps(samples))
    part.rename(done)
    return done


def _train(tuning: Tuning, how: str, row: str) -> None:
    """Train under a row's method for an epoch, and merge; both go on where they were."""
    merged, folder = tuning.model(how, row), tuning.out / "runs" / f"{how}-{row}"
    if (merged / "model.safetensors").is_file():
        return
    training = tuning.out / "training"
    command = [
        "-m", "eval.nano.trainer", "--model_name_or_path", EMBEDDED, "--version", "v1",
        "--pruner", "hivtp", "--pruner_args", one_row(load_table(CONFIG), row).spelled,
        "--data_path", training / "data.json", "--image_folder", training, *HOW[how],
        "--output_dir", folder, "--num_train_epochs", "1", "--save_steps", "100",
        "--save_total_limit", "2", "--per_device_train_batch_size", tuning.batch,
        "--lr_scheduler_type", "cosine", "--warmup_ratio", "0.03", "--weight_decay", "0",
        "--model_max_length", "2048", "--logging_steps", "10", "--report_to", "none",
        "--use_cpu", "True",
    ]  # fmt: skip
    began = _processor_time()
    _python(tuning, tuning.trainer, command)
    spent = folder / "seconds.json"  # of all calls that it took
    before = json.loads(spent.read_text()) if spent.is_file() else 0.0
    spent.write_text(json.dumps(before + _processor_time() - began))
    _python(tuning, tuning.trainer, ["-m", "llava_hivtp.training.merge", EMBEDDED, folder, merged])


def _ask(tuning: Tuning, model: Path, data: Path, rows: Sequence[str]) -> None:
    command = ["-m", "eval", "run", CONFIG, "--model", model, "--rows", ",".join(rows)]
    command += ["--out", tuning.out / "results", "--data", data, "--no-timing", "--batch", "8"]
    _python(tuning, Path(sys.executable), command)


def _python(tuning: Tuning, python: Path, command: Sequence[str | Path]) -> None:
    """Run a Python of its own, its output in a log.

    Raises:
        RuntimeError: if it fails.
    """
    log = tuning.out / "tuning.log"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    environment["HF_DATASETS_CACHE"] = str(tuning.out.resolve() / "cache")
    with log.open("ab") as file:
        words = [str(python.absolute()), *map(str, command)]
        done = subprocess.run(words, env=environment, stdout=file, stderr=file, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command[:2]))} failed; see {log}")


def _processor_time() -> float:
    """CPU seconds of the processes that have ended."""
    spent = os.times()
    return spent.children_user + spent.children_system


def report(tuning: Tuning) -> str:
    """Markdown: every training, before and after, pruned and not, with paired intervals.

    What is not complete yet is left out.
    """
    before = _scored(tuning, EMBEDDED)
    lines = [("tuned", "asked", "before", "after", "after minus before")]
    each = [("model", "asked", *load_table(CONFIG).tasks)]
    each += [(EMBEDDED.name, name, *_percents(found)) for name, found in before.items()]
    for row in tuning.rows:
        for how in HOW:
            after = _scored(tuning, tuning.model(how, row))
            for name in (name for name in (row, "full") if name in after and name in before):
                gap = difference(after[name], before[name])
                lines.append(
                    (f"{how}, {row}", name, f"{mean(before[name])}", f"{mean(after[name])}",
                     gap.said(gap.p_value))
                )  # fmt: skip
                each.append((f"{how}, {row}", name, *_percents(after[name])))
    return "\n\n".join([*_head(tuning), pipes(lines, 2), pipes(each, 2)])


def _head(tuning: Tuning) -> list[str]:
    runs = {path.parent.name: json.loads(path.read_text()) for path in _spent(tuning)}
    samples = len(json.loads((tuning.out / "training" / "data.json").read_text()))
    minutes = ", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in runs.items())
    return [
        f"python -m eval.nano tune, at commit {commit()}, on {device_name()}, one thread",
        f"{tuning.pictures} pictures, {samples} questions, one epoch, batch {tuning.batch}. CPU "
        f"minutes of each training, in all: {minutes}. Sets of size {tuning.size!r}; mean of the "
        f"{len(load_table(CONFIG).tasks)} benchmarks on 0 to 100, 95 % intervals, differences "
        "paired by question, p-values uncorrected. `full` is the same model, unpruned.",
    ]


def _spent(tuning: Tuning) -> list[Path]:
    return sorted((tuning.out / "runs").glob("*/seconds.json"))


def _scored(tuning: Tuning, model: Path) -> Mapping[str, Scored]:
    table = load_table(CONFIG, str(model))
    shelf = Shelf(table, tuning.out / "results", select_rows(table))
    found = {row.id: scored(shelf, row) for row in table.rows}
    return {name: groups for name, groups in found.items() if groups}


def _percents(found: Scored) -> list[str]:
    return [f"{in_percent(groups):.1f}" for groups in found.values()]
