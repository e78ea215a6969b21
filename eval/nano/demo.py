"""Tables 1, 2 and 3 on the embedded model, offline, in minutes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from eval import ROOT
from eval.nano.summary import TIMED
from eval.plan.table import Table, load_table, select_rows
from eval.results.shelf import Shelf
from eval.run.job import Job
from eval.run.progress import Progress

NOTE = """\
This is the embedded model: a LLaVA of 2.3 million weights, trained in under an hour on drawn
pictures, answering questions about drawn pictures. It shows that the whole pipeline works and what
its tables look like. It is no evidence about the methods on a real LLaVA: its vision tower was
taught what every patch shows and, in the layers that HIVTP reads, to attend to what is drawn, so
HIVTP's lead is built in; the AnyRes one met pruned inputs in training; and the order of the methods
changes from one such model to the next. MME here has 5 categories and 1000 points."""


@dataclass(frozen=True)
class Part:
    """One table of the demo and what it runs on."""

    number: int
    images: str  # of `eval.nano.datasets`
    quick: str | None = None  # rows of the quick demo, None: all; the larger ones ask all

    @property
    def config(self) -> Path:
        return ROOT / "configs" / "nano" / f"table{self.number}.yaml"

    def table(self) -> Table:
        table = load_table(self.config)
        return load_table(self.config, str(ROOT / table.model))


# The paper's rows, and every other method at one budget: inside the language model that is 50 %.
PARTS = (
    Part(1, "small", "paper,*-25,fastv-50,pdrop-50,sparsevlm-50,dart-50"),
    Part(2, "large", "paper"),
    Part(3, "small"),
)
BATCH = 8


@dataclass(frozen=True)
class Demo:
    """What to run and where; tests narrow it down."""

    out: Path
    size: str = "quick"
    rows: str | None = None
    limit: int | None = None
    workers: int = 2
    timed: int = 8  # requests per row

    def data(self, images: str, blank: bool = False) -> Path:
        return self.out / "data" / f"{self.size}-{images}{'-blank' if blank else ''}"

    @property
    def results(self) -> Path:
        return self.out / self.size

    @property
    def blind(self) -> Path:
        return self.results / "blind"

    def shelves(self) -> list[tuple[Shelf, Path]]:
        """All that is answered, in this order, with the data it is about."""
        found = []
        for part in PARTS:
            table = part.table()
            rows = select_rows(table, self._chosen(part))
            shelf = Shelf(table, self.results, rows, limit=self.limit)
            found.append((shelf, self.data(part.images)))
        table, images = PARTS[0].table(), PARTS[0].images
        blind = Shelf(table, self.blind, select_rows(table, "full"), limit=self.limit)
        return [*found, (blind, self.data(images, blank=True))]

    def _chosen(self, part: Part) -> str | None:
        if part.number == 3:
            return None
        return self.rows or (part.quick if self.size == "quick" else None)

    def timed_shelves(self) -> list[tuple[Shelf, Path]]:
        """What is timed: Tables 1 and 2 on one benchmark."""
        return [
            (Shelf(shelf.table, self.results, shelf.rows, (TIMED,), self.limit), data)
            for shelf, data in self.shelves()[:2]
        ]


def run_demo(demo: Demo) -> list[str]:
    """Draw, evaluate, time, and write the tables; returns the lines to end with."""
    spent = _Minutes()
    with spent.of("drawing"):
        _draw(demo)
    with spent.of("answers"):
        _answer(demo)
    with spent.of("times"):
        _time(demo)
    with spent.of("tables"):
        index, lines = _write(demo)
    return [NOTE, "", *lines, f"{index} ({spent})"]


@dataclass
class _Minutes:
    """Minutes of every stage, passed and worked by this process and those it waited for."""

    stages: dict[str, tuple[float, float]] = field(default_factory=dict)

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        began, worked = time.monotonic(), _worked()
        yield
        self.stages[stage] = (time.monotonic() - began) / 60, (_worked() - worked) / 60

    def __str__(self) -> str:
        wall, cpu = (sum(each) for each in zip(*self.stages.values(), strict=True))
        each = ", ".join(f"{name} {w:.1f} ({c:.1f})" for name, (w, c) in self.stages.items())
        return f"{wall:.1f} minutes, of CPUs {cpu:.1f}: {each}"


def _worked() -> float:
    """CPU seconds so far."""
    found = os.times()
    return found.user + found.system + found.children_user + found.children_system


def work(demo: Demo, timing: bool) -> None:
    """One process's work; others may do the same at the same time. It says what it does."""
    for shelf, data in demo.timed_shelves() if timing else demo.shelves():
        Job(shelf, data.resolve(), BATCH, demo.timed if timing else 0).run()


def _draw(demo: Demo) -> None:
    from datasets import disable_progress_bars

    from eval.nano.datasets import write

    disable_progress_bars()  # one for each of some thirty files
    for images, blank in (("small", False), ("large", False), ("small", True)):
        write(demo.data(images, blank), demo.size, images, blank)


def _answer(demo: Demo) -> None:
    """Several processes share the units of all tables: each takes what no other one holds.

    A process that starts reads Python for ten seconds, so each does all tables.
    """
    shelves = [shelf for shelf, _ in demo.shelves()]
    paths = {unit.path for shelf in shelves for unit in shelf.units}  # tables share some
    jobs = [_start(demo) for _ in range(demo.workers)]
    _follow("answers", "unit", jobs, len(paths), lambda: sum(path.is_file() for path in paths))
    missing = [u.path for shelf in shelves for u in shelf.units if not shelf.state(u).answered]
    if missing:
        raise RuntimeError(
            f"{len(missing)} units are missing, such as {missing[0]}; see {_log(demo)}"
        )


def _time(demo: Demo) -> None:
    """Alone on the machine, one request at a time."""
    shelves = [shelf for shelf, _ in demo.timed_shelves()]
    total = sum(len(shelf.units) for shelf in shelves)
    job = _start(demo, "--timing")
    _follow("times", "row", [job], total, lambda: sum(_timed(shelf) for shelf in shelves))
    if job.returncode or sum(_timed(shelf) for shelf in shelves) < total:
        raise RuntimeError(f"timing failed; see {_log(demo)}")


def _timed(shelf: Shelf) -> int:
    return sum(shelf.state(unit).timed for unit in shelf.units)


def _follow(
    label: str,
    unit: str,
    jobs: Sequence[subprocess.Popen[bytes]],
    total: int,
    finished: Callable[[], int],
) -> None:
    """Show how many are finished until all processes have ended."""
    with Progress(label, total, finished(), unit) as bar:
        while any(job.poll() is None for job in jobs):
            time.sleep(0.5)
            bar.update(finished() - bar.n)
        bar.update(finished() - bar.n)


def _start(demo: Demo, *options: str) -> subprocess.Popen[bytes]:
    """`work` in a process of its own, one thread, offline."""
    command = [sys.executable, "-m", "eval.nano", "work", str(demo.out.resolve())]
    command += ["--size", demo.size, *options]
    command += ["--rows", demo.rows] if demo.rows else []
    command += ["--limit", str(demo.limit)] if demo.limit else []
    demo.out.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in (str(ROOT), os.getenv("PYTHONPATH")) if p),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",  # a model this small is slower on a GPU
        "HF_DATASETS_CACHE": str(demo.out.resolve() / "data" / "cache"),
        "PYTHONUNBUFFERED": "1",
    }
    with _log(demo).open("ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def _log(demo: Demo) -> Path:
    return demo.out / "demo.log"


def _write(demo: Demo) -> tuple[Path, list[str]]:
    """The three tables, the plot and a summary, in one folder."""
    from eval.nano.summary import report
    from eval.report.pareto import draw_pareto
    from eval.report.table import render
    from eval.results.collect import collect

    shelves = [shelf for shelf, _ in demo.shelves()]
    for part, shelf in zip(PARTS, shelves, strict=False):  # the blind one is no table
        found = collect(shelf.table, shelf.rows, demo.results, demo.limit)
        text = f"{NOTE}\n\n{render([found], 'md')}\n"
        (demo.results / f"table{part.number}.md").write_text(text)
        picture = draw_pareto(found) if part.number == 1 else None
        if picture:
            picture.savefig(demo.results / "pareto.png")
    shelves = (Shelf(PARTS[0].table(), out, limit=demo.limit) for out in (demo.results, demo.blind))
    body, lines = report(*shelves)
    index = demo.results / "summary.md"
    index.write_text(f"{NOTE}\n\n{body}\n\n" + "\n".join(f"- {line}" for line in lines) + "\n")
    return index, lines
