"""Killed at any moment, by torchrun or alone: the rerun ends where an undisturbed run ends."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from eval.plan.table import load_table
from eval.results.shelf import Shelf
from eval.run.job import Job, Stopped

ROOT = Path(__file__).parent.parent
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
PATIENCE = 1800  # seconds, for a crowded machine
COMPARED = ("unit", "score", "metrics", "requests", "tokens", "protocol")


def command(config, drawn, out, *options, launch=()):
    call = ["-m", "eval", "run", config, "--data", drawn, "--out", out, *options]
    return [sys.executable, *launch, *map(str, call)]


def start(*arguments, **options):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])  # with the tests' own methods
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(*arguments, **options), env=environment, cwd="/", start_new_session=True
    )


def contents(config, out, **options):
    """What a table is made of: all of it but times, dates and versions."""
    shelf = Shelf(load_table(config), out, **options)
    assert states(config, out, **options) == ["done"] * len(shelf.units)
    results = [shelf.result(unit) for unit in shelf.units]
    return [
        ([getattr(result, key) for key in COMPARED], shelf.samples(unit))
        for unit, result in zip(shelf.units, results, strict=True)
    ]


def states(config, out, **options):
    """How far every unit is."""
    shelf = Shelf(load_table(config), out, **options)
    return [shelf.state(unit).kind for unit in shelf.units]


def wait_for(condition, process=None, seconds=PATIENCE):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        assert process is None or process.poll() is None, "the process ended by itself"
        time.sleep(0.02)


def journaled(out):
    """Finished requests of the units in work."""
    count = 0
    for journal in out.rglob("*.journal.jsonl"):
        with contextlib.suppress(FileNotFoundError):  # its unit was finished meanwhile
            count += len(journal.read_bytes().splitlines())
    return count


def test_what_was_answered_before_an_error_is_not_asked_again(table, drawn, tmp_path):
    """In one process: the third batch breaks, the rerun asks for that batch and those behind."""
    config = table("pope", rows=("hivtp",))
    shelf = Shelf(load_table(config), tmp_path / "out", limit=8)
    asked = []

    def job(breaks_at):
        made = Job(shelf, drawn, batch=2)
        load = made._load

        def fragile():
            worker = load()
            answer_all = worker.lm._answer_all

            def answer(batch):
                if len(asked) == breaks_at:
                    raise RuntimeError("CUDA out of memory")
                asked.append([r.question for _, part in batch for r in part.requests])
                return answer_all(batch)

            worker.lm._answer_all = answer
            return worker

        made._load = fragile
        return made

    assert job(breaks_at=2).run() == 1
    assert "RuntimeError: CUDA out of memory" in shelf.state(shelf.units[0]).reason
    assert job(breaks_at=None).run() == 0
    assert len(asked) == 4  # two batches before, two after: none twice
    assert sum(map(len, asked)) == 8
    undisturbed = tmp_path / "undisturbed"
    whole = Job(Shelf(load_table(config), undisturbed, limit=8), drawn, batch=2)
    assert whole.run() == 0
    assert contents(config, tmp_path / "out", limit=8) == contents(config, undisturbed, limit=8)


@pytest.fixture
def watched(drawn, tmp_path):
    """A job on 8 questions in batches of 2, two threads ahead; notes which are asked."""

    def make(config, asked, data=drawn, at=None, then=None):
        job = Job(Shelf(load_table(config), tmp_path / "out", limit=8), data, batch=2)
        load = job._load

        def noting():
            worker = load()
            answer_all = worker.lm._answer_all

            def answer(batch):
                if len(asked) == at:
                    then()
                asked.append([r.question for _, part in batch for r in part.requests])
                return answer_all(batch)

            assert worker.lm.workers == 2
            worker.lm._answer_all = answer
            return worker

        job._load = noting
        return job

    return make


def running():
    return [t for t in threading.enumerate() if t.name.startswith(("ahead", "behind"))]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_under_threads_loses_no_answer_and_leaves_none_running(
    table, drawn, tmp_path, watched, number
):
    config, asked = table("pope", rows=("hivtp",)), []
    with pytest.raises(Stopped, match=number.name):
        watched(config, asked, at=2, then=lambda: os.kill(os.getpid(), number)).run()
    assert not running()
    assert journaled(tmp_path / "out") == 4
    assert watched(config, asked).run() == 0
    assert sorted(map(len, asked)) == [2, 2, 2, 2]  # none of them twice
    whole = Job(Shelf(load_table(config), tmp_path / "whole", limit=8), drawn, batch=2)
    assert whole.run() == 0
    assert contents(config, tmp_path / "out", limit=8) == contents(
        config, tmp_path / "whole", limit=8
    )


def test_a_broken_image_in_the_middle_is_named_and_what_was_before_it_stays(
    table, drawn, tmp_path, watched
):
    from pyarrow import array, parquet

    (whole,) = (drawn / "lmms-lab-encoder/POPE").rglob("*.parquet")
    shutil.copytree(drawn / "lmms-lab-encoder/POPE", tmp_path / "data/lmms-lab-encoder/POPE")
    rows = parquet.read_table(whole)
    images = rows["image"].to_pylist()
    images[5]["bytes"] = images[5]["bytes"][:300]
    place = rows.schema.get_field_index("image")
    broken = rows.set_column(place, rows.schema.field(place), array(images, rows["image"].type))
    parquet.write_table(broken, tmp_path / "data" / whole.relative_to(drawn))

    config, asked = table("pope", rows=("hivtp",)), []
    job = watched(config, asked, tmp_path / "data")
    assert job.run() == 1
    assert not running()
    assert "pope: document 5 cannot be read" in job.shelf.state(job.shelf.units[0]).reason
    assert journaled(tmp_path / "out") == 2 * len(asked) > 0
    before = len(asked)
    assert watched(config, asked, tmp_path / "data").run() == 1
    assert len(asked) == before  # the rerun comes to the broken one at once


@pytest.mark.slow
def test_killed_in_the_middle_of_a_unit_the_rerun_gives_the_same(table, drawn, tmp_path):
    config = table("pope, mme", rows=("full", "hivtp"))
    options = ("--no-timing", "--limit", 20)
    assert start(config, drawn, tmp_path / "whole", *options).wait(PATIENCE) == 0

    out = tmp_path / "out"

    shelf = Shelf(load_table(config), out, limit=20)

    def finished():
        """Requests whose answers are on the disk."""
        done = sum(shelf.state(unit).answered for unit in shelf.units)
        return 20 * done + journaled(out)  # in this order no unit counts twice

    for enough in (5, 47):  # in the first unit and in the third
        process = start(config, drawn, out, *options)
        wait_for(lambda enough=enough: finished() >= enough, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert enough <= finished() < 80
    for journal in out.rglob("*.journal.jsonl"):
        with journal.open("ab") as file:
            file.write(b'{"key": "a line cut sho')
    assert start(config, drawn, out, *options).wait(PATIENCE) == 0
    assert contents(config, out, limit=20) == contents(config, tmp_path / "whole", limit=20)


@pytest.mark.slow
def test_two_ranks_and_two_processes_give_the_table_of_one(table, drawn, tmp_path):
    """Under torchrun; and two plain processes on one folder, none of them twice at a unit."""
    config = table("pope, ocrbench", rows=("full", "hivtp"))
    options = ("--no-timing", "--limit", 6)
    assert start(config, drawn, tmp_path / "one", *options).wait(PATIENCE) == 0
    one = contents(config, tmp_path / "one", limit=6)
    assert start(config, drawn, tmp_path / "ranks", *options, launch=TORCHRUN).wait(PATIENCE) == 0
    assert contents(config, tmp_path / "ranks", limit=6) == one
    both = [start(config, drawn, tmp_path / "both", *options) for _ in range(2)]
    assert [process.wait(PATIENCE) for process in both] == [0, 0]
    assert contents(config, tmp_path / "both", limit=6) == one


@pytest.mark.slow
def test_a_failed_unit_does_not_end_the_other_rank(table, drawn, tmp_path):
    """The launcher ends all ranks when one leaves with an error: none leaves before the others."""
    config = table("pope", rows=("failing", "full"))
    options = ("--no-timing", "--limit", 6)
    assert start(config, drawn, tmp_path / "out", *options, launch=TORCHRUN).wait(PATIENCE) != 0
    assert states(config, tmp_path / "out", limit=6) == ["failed", "done"]


@pytest.mark.slow
def test_the_script_of_a_table_prints_it(table, drawn, tmp_path):
    """`bash scripts/table1.sh` with everything set by the environment, from another folder."""
    settings = {
        "CONFIG": table("pope, gqa"), "DATA": drawn, "OUT": tmp_path / "out", "LIMIT": "4",
        "TIMING_N": "2", "BATCH": "2", "ROWS": "full hivtp", "PYTHON": sys.executable,
    }  # fmt: skip
    done = subprocess.run(
        ["bash", ROOT / "scripts/table1.sh"],
        env=os.environ | {key: str(value) for key, value in settings.items()},
        cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "4 units, 4 done" in done.stdout
    assert "| 50 %" in done.stdout
    assert json.loads(next((tmp_path / "out").rglob("*.limit4.json")).read_text())["requests"] == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "error: name one table: bash scripts/slurm/submit.sh table1"),
        (["table9"], "error: there is no configs/table9.yaml"),
        (["table1"], "error: sbatch is not here: log in to a node of the cluster"),
    ],
)
def test_a_submission_that_cannot_be_says_why(tmp_path, arguments, said):
    for tool in ("bash", "dirname", "env"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    done = subprocess.run(
        ["bash", ROOT / "scripts/slurm/submit.sh", *arguments],
        env={"PATH": str(tmp_path)}, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(said)


@pytest.mark.slow
def test_two_processes_killed_at_random_moments_leave_the_table_of_one(tmp_path):
    """As `scripts/kill_runs.py` prints it; twenty kills are kept in `eval/measured/`."""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/kill_runs.py", "3", str(time.time_ns() % 1000)],
        capture_output=True, text=True, timeout=PATIENCE, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 different tables or leftover files" in done.stdout.splitlines()[-1]
