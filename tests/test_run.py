"""A run: every unit once, every failure seen, nothing lost."""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from stored import store_result
from typer.testing import CliRunner

from eval import digests
from eval.__main__ import app
from eval.benchmarks import data as datasets
from eval.benchmarks.record import Part
from eval.benchmarks.records import BENCHMARKS
from eval.plan.table import load_table
from eval.plan.units import units
from eval.results import store
from eval.results.shelf import Shelf
from eval.run import harness as official
from eval.run import timing
from eval.run.job import Job, Stopped
from eval.run.journal import Journal
from eval.run.progress import Progress, duration
from eval.run.ranks import Rank, own_rank


def call(*arguments):
    return CliRunner().invoke(app, ["run", *map(str, arguments)])


@pytest.fixture
def job(drawn, tmp_path):
    """A job over a table's units, in this process."""

    def make(config, limit=2, **settings):
        return Job(Shelf(load_table(config), tmp_path / "out", limit=limit), drawn, **settings)

    return make


def test_a_run_fills_a_table_and_runs_nothing_twice(table, drawn, tmp_path, monkeypatch):
    config, out = table("pope, ocrbench"), tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    arguments = (config, "--data", drawn, "--out", "out", "--limit", 4, "--timing-n", 2)
    done = call(*arguments, "--batch", 3)
    assert done.exit_code == 0, done.output
    assert Path.cwd() == tmp_path
    shelf = Shelf(load_table(config), out, limit=4)
    results = [shelf.result(unit) for unit in shelf.units]
    assert [r.unit["task"] for r in results] == ["pope", "ocrbench"] * 2
    assert [r.tokens.patches for r in results] == [16, 16, 8, 8]
    assert {r.tokens.total for r in results} == {16}
    assert all(r.requests == 4 and r.protocol["batch size"] == 3 for r in results)
    assert all(len(shelf.samples(unit)) == 4 for unit in shelf.units)
    timings = [shelf.timing(unit) for unit in shelf.units]
    assert all(t.requests == 2 and t.ttft_ms > 0 for t in timings)
    assert not [*out.rglob("*.journal.jsonl"), *out.rglob("*.failed.json"), *out.rglob("*.lock")]

    monkeypatch.setattr(
        "eval.run.job.Job._load", lambda self: pytest.fail("the model is loaded again")
    )
    assert call(*arguments).exit_code == 0


def test_ocrbench_counts_from_zero_every_time(job, table):
    """Its points lie in a global of its module: a second evaluation would double them."""
    from llava_hivtp.answer import Answer

    todo = job(table("ocrbench", rows=("full", "hivtp")), limit=3)
    load = Job._load

    def gold(self):
        worker = load(self)
        texts = ["".join(doc) for doc in _answers(worker.folder)]
        worker.lm.ready = lambda i, requests: requests[i]
        worker.lm._prepare_all = lambda batch: batch
        worker.lm._answer_all = lambda batch: [Answer(texts[i.args[3]], 1) for i in batch]
        return worker

    todo._load = lambda: gold(todo)
    assert todo.run() == 0
    assert [todo.shelf.result(unit).score for unit in todo.shelf.units] == [0.3, 0.3]


def _answers(folder):
    from pyarrow import parquet

    (file,) = datasets.files(folder, BENCHMARKS["ocrbench"].data[0])
    return parquet.read_table(file, columns=["answer"]).column("answer").to_pylist()


def test_a_failed_unit_is_recorded_and_the_others_go_on(table, drawn, tmp_path, caplog):
    config = table("pope", rows=("failing", "full"))
    arguments = (config, "--data", drawn, "--out", tmp_path / "out", "--limit", 2, "--no-timing")
    done = call(*arguments)
    assert done.exit_code == 1
    shelf = Shelf(load_table(config), tmp_path / "out", limit=2)
    failing, full = (shelf.state(unit) for unit in shelf.units)
    assert full.kind == "done"
    assert failing.kind == "failed"
    assert failing.reason == "RuntimeError: this method fails"
    assert caplog.messages[-2:] == [  # once more, where it is seen
        "failed: failing pope: RuntimeError: this method fails",
        "1 of 2 units failed",
    ]

    table("pope", rows=("full",))
    assert call(*arguments).exit_code == 0


def test_a_corrupt_image_fails_its_unit_only(job, table, drawn, tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    data = tmp_path / "data"
    shutil.copytree(drawn, data)
    (file,) = datasets.files(data, BENCHMARKS["pope"].data[0])
    rows = parquet.read_table(file)
    images = rows.column("image").to_pylist()
    questions = rows.column("question").to_pylist()
    last = min((3, 2, 1), key=lambda i: len(questions[i]))  # the longest question comes first
    images[last]["bytes"] = images[last]["bytes"][:200]
    at = rows.schema.get_field_index("image")
    parquet.write_table(
        rows.set_column(
            at, rows.schema.field("image"), pa.array(images, rows.schema.field("image").type)
        ),
        file,
    )
    todo = job(table("pope, ocrbench", rows=("full",)), limit=4)
    todo.data = data
    assert todo.run() == 1
    pope, ocrbench = todo.shelf.units
    assert todo.shelf.state(ocrbench).kind == "done"
    assert f"pope: document {last} cannot be read" in todo.shelf.state(pope).reason
    journal = store.beside(pope.path, "journal.jsonl").read_text().splitlines()
    assert journal  # what was answered before is not lost


def test_the_data_of_a_task_are_read_once_for_each_state_of_its_files(drawn, tmp_path):
    from pyarrow import parquet

    name = "lmms-lab-encoder/POPE"
    shutil.copytree(drawn / name, tmp_path / name)
    first, second = (official.load_task("pope", tmp_path) for _ in range(2))
    assert second is not first
    assert second.dataset is first.dataset
    assert second.config.process_results is not first.config.process_results  # modules run anew
    (file,) = (tmp_path / name).rglob("*.parquet")
    parquet.write_table(parquet.read_table(file)[1:], file)
    assert len(official.load_task("pope", tmp_path).test_docs()) == len(first.test_docs()) - 1


def test_an_answer_may_hold_any_character(job, table):
    from llava_hivtp.answer import Answer

    todo = job(table("pope", rows=("full",)))
    load, text = Job._load, 'yes\x00\x07\x1b[31m\u2028"\\\N{CHICKEN}\n'

    def odd(self):
        worker = load(self)
        worker.lm._prepare_all = lambda batch: batch
        worker.lm._answer_all = lambda batch: [Answer(text, 3) for _ in batch]
        return worker

    todo._load = lambda: odd(todo)
    assert todo.run() == 0
    samples = todo.shelf.samples(todo.shelf.units[0])
    assert [sample.answer for sample in samples] == [text, text]


def test_a_result_cut_in_half_is_run_again(job, table):
    todo = job(table("pope", rows=("full",)))
    assert todo.run() == 0
    (unit,) = todo.shelf.units
    before = todo.shelf.result(unit)
    unit.path.write_bytes(unit.path.read_bytes()[: unit.path.stat().st_size // 2])
    assert todo.shelf.state(unit).kind == "missing"
    assert todo.run() == 0
    assert replace(todo.shelf.result(unit), seconds=0, provenance={}) == replace(
        before, seconds=0, provenance={}
    )


def test_what_another_process_holds_is_left_for_last(job, table, monkeypatch):
    """Waiting for it at once cost two processes half a second a unit."""
    todo = job(table("pope, ocrbench", rows=("full", "hivtp")))
    first, *others = [unit.path for unit in todo.shelf.units]
    asked, lock = [], store._try_lock

    def noted(path, patience_s):
        asked.append((path.name, bool(patience_s)))
        return lock(path, patience_s)

    with store.locked(first) as ours:
        assert ours
        monkeypatch.setattr(store, "_try_lock", noted)
        todo.run()
    names = [store.beside(path, "lock").name for path in (first, *others)]
    assert asked[:5] == [*((name, False) for name in names), (names[0], True)]
    assert [todo.shelf.state(unit).answered for unit in todo.shelf.units] == [False, *[True] * 3]


def test_results_of_another_protocol_are_not_added_to(job, table, drawn):
    first = job(table("pope", rows=("full",)))
    assert first.run() == 0
    odd = {"arguments": {"dtype": "bfloat16"}}
    second = job(table("pope", rows=("full", "hivtp")), **odd)
    with pytest.raises(
        ValueError, match=r"another --out(.*\n)*.*dtype: float32 \(full\); bfloat16"
    ):
        second.run()
    assert not store.beside(second.shelf.units[1].path, "failed.json").exists()


def test_a_full_disk_is_reported_and_loses_nothing(job, table, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a small tmpfs cannot be mounted here: no rights")
    try:
        config = table("pope", rows=("full",))
        shelf = Shelf(load_table(config), disk, limit=2)
        first = Job(shelf, job(config).data)
        filler = disk / "filler"
        filler.write_bytes(b"0" * (disk_free(disk) - 4096))
        assert first.run() == 1
        (unit,) = shelf.units
        assert re.search(r"No space left on device: '.*pope\.limit2", first.failures[unit.path])
        assert shelf.state(unit).kind in ("missing", "begun", "failed")
        filler.unlink()
        assert Job(shelf, first.data).run() == 0
        assert shelf.state(unit).kind == "done"
    finally:
        subprocess.run(["umount", disk], check=True)


def disk_free(folder):
    return shutil.disk_usage(folder).free


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--limit", "3"],
            "MME scores 2 questions together: --limit must be a multiple of 2, got 3",
        ),
        (["--shard", "0/4"], "--shard must be i/n with 1 <= i <= n, such as 1/4; got '0/4'"),
        (["--shard", "half"], "got 'half'"),
        (["--model-args", "dtyp=float16"], "--model-args takes key=value of dtype, device_map"),
        (["--rows", "hivpt"], "no row 'hivpt'"),
        (["--data", "nowhere"], "lacks lmms-lab-encoder/MME (test), lmms-lab-encoder/POPE (test)"),
        (["--model", "liuhaotian/llava-v9"], "no checkpoint"),
    ],
)
def test_a_mistake_is_one_clear_line(table, drawn, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    data = () if "--data" in arguments else ("--data", drawn)
    done = call(table(), "--out", tmp_path / "out", *data, *arguments)
    assert done.exit_code == 1
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_a_dry_run_touches_nothing_and_counts_the_hours(tmp_path):
    config = Path(__file__).parent.parent / "configs/table1.yaml"
    done = call(config, "--dry-run", "--rows", "full", "--out", tmp_path / "out", "--no-timing")
    assert done.exit_code == 0
    # 39386 requests of 140 ms and 4 tokens at 18.66 a second each
    assert "8 units, 3.9 hours on one device (at the paper's times on an NVIDIA A40" in done.stdout
    assert not (tmp_path / "out").exists()
    assert "--rows paper" not in done.stdout
    done = call(config, "--dry-run", "--out", tmp_path / "out")
    assert "--rows paper (ROWS=paper) runs the 21 rows of the paper alone" in done.stdout


def test_a_plan_can_be_measured_here(table, drawn, tmp_path):
    asked = [table("pope"), "--dry-run", "--data", drawn, "--out", tmp_path / "out"]
    done = call(*asked, "--calibrate", 1)
    assert done.exit_code == 0, done.stderr
    hours = re.findall(r"([\d.]+) hours on one device \((.+?)\)", done.stdout)
    assert [source for _, source in hours][:1] == ["at the pace measured here just now"]
    assert not (tmp_path / "out").exists()
    assert call(asked[0], "--calibrate", 1).exit_code == 1  # measures for a plan only


def test_rows_between_the_two_measured_ones_lie_on_the_line(monkeypatch):
    from eval.run import calibrate

    clock = iter(range(10**6))
    monkeypatch.setattr(calibrate.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(calibrate.official, "load_task", lambda *_: None)
    monkeypatch.setattr(calibrate.official, "requests", lambda *_: [1, 2])
    decoder = SimpleNamespace(layers=[None] * 32)
    model = SimpleNamespace(pruner=None, get_decoder=lambda: decoder)
    lm = SimpleNamespace(batch_size=2, model=model)

    def generate(instances):
        for _ in range(lm.model.pruner.budget(1, 576)):
            next(clock)

    lm.generate_until = generate
    worker = SimpleNamespace(lm=lm, folder=None, patches=576)
    config = Path(__file__).parent.parent / "configs/table1.yaml"
    rows = [row for row in load_table(config).rows if row.set == "paper"]
    found = calibrate.calibrate(worker, rows, "pope", 0)
    assert {row.id for row in rows} == set(found)
    for row in rows:  # a tick per token and one for the call, two requests
        assert found[row.id] == pytest.approx((row.build().budget(1, 576) + 1) / 2)


def test_shards_and_ranks_divide_the_units(table, tmp_path):
    from eval.verbs.run import _shard

    chosen = units(load_table(table("mme, pope, gqa")), tmp_path)
    shards = [_shard(chosen, f"{i}/4") for i in (1, 2, 3, 4)]
    assert sorted(map(len, shards)) == [1, 1, 2, 2]
    assert {u.path for shard in shards for u in shard} == {u.path for u in chosen}
    orders = [Rank(i, 2).order(chosen) for i in (0, 1)]
    assert orders[0][:3] == chosen[0::2]
    assert orders[1][:3] == chosen[1::2]
    assert all(sorted(o, key=chosen.index) == chosen for o in orders)


def test_the_rank_is_hidden_from_lmms_eval(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with own_rank() as rank:
        assert rank == Rank(1, 2)
        assert "RANK" not in os.environ
    assert os.environ["WORLD_SIZE"] == "2"


def test_a_signal_stops_the_run_without_a_failure(job, table):
    todo = job(table("pope", rows=("full",)))
    load = Job._load

    def stopped(self):
        worker = load(self)
        worker.lm._answer_all = lambda batch: os.kill(os.getpid(), signal.SIGUSR1)
        return worker

    todo._load = lambda: stopped(todo)
    with pytest.raises(Stopped, match="SIGUSR1"):
        todo.run()
    (unit,) = todo.shelf.units
    assert todo.shelf.state(unit).kind == "begun"
    assert not store.beside(unit.path, "failed.json").exists()


def instance(doc_id, prompt="what?", **options):
    return SimpleNamespace(
        args=(prompt, {"max_new_tokens": 16} | options, None, doc_id, "pope", "test")
    )


def test_a_journal_knows_equal_requests_only(tmp_path):
    from llava_hivtp.answer import Answer

    path, answer = tmp_path / "unit.journal.jsonl", Answer("yes", 2, 16, 0, 16)
    journal = Journal(path, "identity")
    journal.add([(instance(0), answer), (instance(1), answer)])
    journal.close()
    again = Journal(path, "identity")
    assert again.get(instance(0)) == again.get(instance(1)) == answer
    others = [instance(2), instance(0, "why?"), instance(0, max_new_tokens=8)]
    assert [again.get(other) for other in others] == [None] * 3
    assert Journal(path, "another identity").get(instance(0)) is None


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_journal_cut_anywhere_keeps_its_whole_lines(tmp_path, caplog, cut):
    from llava_hivtp.answer import Answer

    path, answer = tmp_path / "unit.journal.jsonl", Answer("yes", 2, 16, 0, 16)
    journal = Journal(path, "identity")
    journal.add([(instance(i), answer) for i in range(3)])
    journal.close()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\x00\xff damaged\n" + lines[2][:-cut])
    again = Journal(path, "identity")
    assert "1 damaged lines ignored" in caplog.text
    assert [again.get(instance(i)) for i in range(3)] == [answer, None, None]
    again.add([(instance(2), answer)])
    again.close()
    assert Journal(path, "identity").get(instance(2)) == answer


def test_a_digest_sees_every_byte_and_reads_a_large_file_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    large = tmp_path / "model.safetensors"
    large.write_bytes(bytes(16 * digests.REMEMBERED))

    def digest():
        return digests.digest_files(tmp_path, [large])

    before = digest()
    with large.open("r+b") as file:
        file.seek(9 * digests.REMEMBERED + 123)
        file.write(b"1")
    changed = digest()
    assert changed != before
    monkeypatch.setattr(digests.hashlib, "file_digest", lambda *_: pytest.fail("read again"))
    assert digest() == changed
    for kept in (tmp_path / "cache" / "llava_hivtp").iterdir():
        kept.write_text("[]")
    with pytest.raises(pytest.fail.Exception):
        digest()


def test_another_checkpoint_voids_what_was_done(table, job, tmp_path):
    """Also where only the tower changed, which lies elsewhere."""
    config = table("pope", rows=("full",))
    todo = job(config, timing_n=1)
    assert todo.run() == 0
    (unit,) = todo.shelf.units
    model = Path(todo.shelf.table.model)
    found = json.loads((model / "config.json").read_text())
    found["initializer_range"] = 0.5
    again = tmp_path / "moved" / model.name
    shutil.copytree(model, again)
    copied = Shelf(load_table(config, str(again)), tmp_path / "out", limit=2)
    assert copied.state(unit).timed
    (again / "config.json").write_text(json.dumps(found))
    changed = Shelf(load_table(config, str(again)), tmp_path / "out", limit=2).state(unit)
    assert (changed.kind, changed.reason) == ("stale", "the checkpoint changed")
    assert not changed.timed


class Slow:
    """Says known times: half a second to prepare, to the first token 20 ms under A, 30 under B."""

    device = torch.device("cpu")

    def __init__(self):
        self.answered, self.model = [], SimpleNamespace(pruner=None)

    def ready(self, i, instances):
        return instances[i]

    def answer(self, requests, timed):
        from llava_hivtp.answer import Answer

        assert timed
        self.answered.append((*requests, self.model.pruner))
        ttft = {"A": 0.02, "B": 0.03}[self.model.pruner]
        return [Answer("yes", 4, preparation=0.5, ttft=ttft, seconds=0.05)]


def test_rows_are_timed_in_turn_and_none_is_always_first():
    lm = Slow()
    found = timing.time_rows(lm, {"a": "A", "b": "B"}, list(range(8)))
    warm_up, counted = lm.answered[: 2 * timing.WARMUP], lm.answered[2 * timing.WARMUP :]
    assert [request for request, _ in warm_up] == sorted([*range(timing.WARMUP)] * 2)
    assert counted == [pair for i in range(8) for pair in [(i, "AB"[i % 2]), (i, "BA"[i % 2])]]
    for times, first in ((found["a"], 0.02), (found["b"], 0.03)):
        assert (times["requests"], times["warmup"]) == (8, timing.WARMUP)
        assert times["samples"] == [[first, 0.05, 4]] * 8
        assert times["ttft_ms"] == pytest.approx(1000 * first)
        assert times["throughput"] == pytest.approx(4 / 0.05)
        assert times["preparation_ms"] == pytest.approx(500)


def test_a_row_that_fails_while_it_is_timed_costs_the_others_nothing(job, table, monkeypatch):
    todo = job(table("pope, mme"), timing_n=2)
    answer = timing._answer

    def failing(lm, request, key, pruner):
        if pruner.layers:
            raise timing.RowFailed(key) from RuntimeError("no memory left")
        return answer(lm, request, key, pruner)

    monkeypatch.setattr(timing, "_answer", failing)
    assert todo.run() == 2
    timed = {(u.row.id, u.task): todo.shelf.state(u).timed for u in todo.shelf.units}
    assert timed == {
        ("full", "pope"): True,
        ("full", "mme"): True,
        ("hivtp", "pope"): False,
        ("hivtp", "mme"): False,
    }
    assert "no memory left" in todo.shelf.state(todo.shelf.units[-1]).reason
    monkeypatch.undo()
    todo.started, todo.failures = time.time(), {}
    assert todo.run() == 0
    assert all(todo.shelf.state(unit).timed for unit in todo.shelf.units)


def test_a_unit_that_somebody_else_holds_is_timed_without(job, table):
    todo = job(table("pope"))
    assert todo.run() == 0
    todo.timing_n = 2
    full, hivtp = todo.shelf.units
    with store.locked(full.path):
        assert todo.run() == 0
    assert [todo.shelf.state(unit).timed for unit in (full, hivtp)] == [False, True]


def test_a_timed_device_is_alone():

    with timing.device_share(torch.device("cpu"), alone=True):
        (path,) = Path(tempfile.gettempdir()).glob(f"llava_hivtp-{os.getuid()}-cpu.lock")
        other = os.open(path, os.O_RDWR)
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
    fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
    with timing.device_share(torch.device("cpu"), alone=False):  # answering needs no solitude
        pass
    os.close(other)


def test_progress_is_plain_lines_off_a_terminal(monkeypatch):
    monkeypatch.setattr("eval.run.progress.PLAIN", 0)
    monkeypatch.setenv("TQDM_DISABLE", "1")  # as a run sets it, for the bars of lmms-eval
    stream = io.StringIO()
    with Progress("full pope", 100, 10, stream=stream) as progress:
        for _ in range(3):
            time.sleep(0.01)
            progress.update(30)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "full pope: 10/100, 10 of them from before"
    assert [line.split(", ")[0].split()[-1] for line in lines[1:4]] == [
        "40/100",
        "70/100",
        "100/100",
    ]
    assert lines[1].endswith("left")
    assert "\r" not in stream.getvalue()


def test_a_log_gets_a_line_rarely_and_a_terminal_a_bar():
    log, terminal = io.StringIO(), io.StringIO()
    terminal.isatty = lambda: True
    for stream in (log, terminal):
        with Progress("full pope", 1000, stream=stream) as progress:
            for _ in range(1000):
                progress.update(1)
    assert len(log.getvalue().split("\n")) <= 4  # the first line, the last one, an end
    assert "\r" in terminal.getvalue()
    assert "1000/1000" in log.getvalue()
    assert "1000/1000" in terminal.getvalue()


def test_durations_are_short():
    assert [duration(s) for s in (42, 600, 12600)] == ["42 s", "10 min", "3.5 h"]


def test_prefetch_takes_the_needed_files_only(drawn, tmp_path, table, monkeypatch):
    """Against a hub made of the drawn data with splits and configurations nobody asked for."""
    hub, data = tmp_path / "hub", tmp_path / "data"
    shutil.copytree(drawn, hub)
    gqa = hub / "lmms-lab-encoder/GQA"
    for extra in ("train_all_images/train-00000-of-00001.parquet", "data/testdev.json"):
        (gqa / extra).parent.mkdir(exist_ok=True)
        (gqa / extra).write_text("unwanted")

    def download(repository, repo_type, allow_patterns, local_dir):
        for file in (hub / repository).rglob("*"):
            name = file.relative_to(hub / repository).as_posix()
            if file.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns):
                (local_dir / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, local_dir / name)

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    done = CliRunner().invoke(app, ["prefetch", str(table("gqa, pope")), "--data", str(data)])
    assert done.exit_code == 0, done.output
    fetched = sorted(p.relative_to(data).as_posix() for p in data.rglob("*.parquet"))
    assert fetched == [
        "lmms-lab-encoder/GQA/testdev_balanced_images/testdev-00000-of-00001.parquet",
        "lmms-lab-encoder/GQA/testdev_balanced_instructions/testdev-00000-of-00001.parquet",
        "lmms-lab-encoder/POPE/data/test-00000-of-00001.parquet",
    ]
    assert len(official.load_task("gqa", data).dataset["testdev"]) == 40


def test_a_data_set_fetched_in_part_is_missing(tmp_path):
    part = Part("someone/MME", "test")
    folder = tmp_path / part.repository / "data"
    folder.mkdir(parents=True)
    (folder / "test-00000-of-00002.parquet").touch()
    assert not datasets._complete([f.stem for f in datasets.files(tmp_path, part)])
    (folder / "test-00001-of-00002.parquet").touch()
    (folder / "train-00000-of-00001.parquet").touch()
    assert datasets._complete([f.stem for f in datasets.files(tmp_path, part)])


def test_the_doctor_names_what_is_broken(monkeypatch, tmp_path):
    from eval.verbs import doctor

    ask = ["doctor", "--data", str(tmp_path), "--out", str(tmp_path)]
    healthy = CliRunner().invoke(app, ask)
    assert healthy.exit_code == 0, healthy.output
    assert "python -m eval prefetch" in healthy.output
    real = doctor.importlib.import_module

    def broken(name):
        if name == "llava.model":
            raise ImportError("cannot import name 'apply_chunking_to_forward'")
        return real(name)

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    ill = CliRunner().invoke(app, ask)
    assert ill.exit_code == 1
    assert "broken  llava-torch    ImportError: cannot import name" in ill.output
    assert ill.output.splitlines()[-1] == "broken: llava-torch"


def test_results_are_json_that_anyone_reads(job, table):
    todo = job(table("pope", rows=("hivtp",)))
    assert todo.run() == 0
    (unit,) = todo.shelf.units
    result = json.loads(unit.path.read_text())
    assert result["unit"]["arguments"] == {"r": 2, "k": 25, "c": 2, "layers": [2, 3]}
    assert result["protocol"]["conversation template"] == "vicuna_v1"
    assert result["protocol"]["task"]["measures"] == "accuracy"
    assert set(result["provenance"]) == {"commit", "versions", "device", "date"}


WRONG = """\
  - {id: absent, pruner: 'nowhere:Mine', keep: 0.5, block: 50}
"""


@pytest.mark.parametrize("verb", ["run", "dry run", "status"])
def test_all_that_would_stop_a_run_is_said_before_any_weights_are_read(
    table, tmp_path, monkeypatch, verb
):
    """A layer the tower lacks, a module that is not here, data, and a template in the config."""
    config = table("pope", rows=("full", "deep"))
    config.write_text(config.read_text() + "\n" + WRONG)
    model = tmp_path / "copy" / "llava-v1.5-vicuna"
    shutil.copytree(load_table(config).model, model)
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | {"conv_template": "vicuna_v9"}))
    monkeypatch.setattr("eval.run.job.Job._load", lambda self: pytest.fail("weights are read"))
    options = ["--model", model, "--data", tmp_path / "no", "--out", tmp_path / "out"]
    options = [*options, "--dry-run"] if verb == "dry run" else options
    call = ["status" if verb == "status" else "run", config, *options]
    done = CliRunner().invoke(app, list(map(str, call)))
    assert done.exit_code == (1 if verb == "run" else 0)
    said = " ".join(done.output.split())
    assert f"{config}:9: row 'deep': HIVTP: layers [9] lie outside 1..4" in said
    assert f"{config}:10: row 'absent': pruner 'nowhere:Mine' cannot be imported" in said
    assert "unknown conv_template 'vicuna_v9'; choose from" in said
    assert f"{tmp_path / 'no'} lacks lmms-lab-encoder/POPE (test)" in said


@pytest.mark.parametrize("verb", ["run", "dry run", "status"])
def test_patches_of_another_grid_are_an_error_of_the_table(table, drawn, tmp_path, verb):
    config = table("pope", rows=("full",))
    config.write_text(config.read_text().replace("patches: 16", "patches: 576"))
    call = ["status" if verb == "status" else "run", config, "--out", tmp_path, "--data", drawn]
    call += ["--dry-run"] if verb == "dry run" else []
    done = CliRunner().invoke(app, list(map(str, call)))
    assert f"{config}: patches is 576, but a tile of" in done.output
    assert "has 16: budgets would be wrong" in done.output


def test_a_metric_that_lmms_eval_lacks_stops_a_run(table, drawn, tmp_path, monkeypatch):
    odd = replace(BENCHMARKS["pope"], metric="pope_acuracy,none")
    monkeypatch.setitem(BENCHMARKS, "pope", odd)
    done = call(table("pope"), "--out", tmp_path, "--data", drawn)
    assert done.exit_code == 1
    assert "lmms-eval's pope has no metric pope_acuracy,none, only" in done.stderr


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("pope.json", {"protocol": 5}, "'protocol' cannot be 5"),
        ("pope.json", [1], "holds [1], no Result"),
        ("pope.timing.json", {"samples": 1}, "is no Timing: 'requests' is missing"),
        ("pope.samples.jsonl", None, ""),
        ("pope.samples.jsonl", "no", "is not what pope.json was stored with"),
    ],
)
def test_damaged_files_are_named_by_every_verb(
    table, drawn, tmp_path, monkeypatch, name, content, said
):
    config, out = table("pope", rows=("full",)), tmp_path / "out"
    shelf = Shelf(load_table(config), out)
    (unit,) = shelf.units
    here = {"checkpoint digest": shelf.checkpoint}
    store_result(out, shelf.table, shelf.rows[0], "pope", [1.0, 0.0], protocol=here)
    file = unit.path.with_name(name)
    if content is None:
        file.unlink()
    elif isinstance(content, str):
        file.write_text(file.read_text().replace('"no"', '"on"'))
    else:
        found = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(found | content if isinstance(content, dict) else content))
    monkeypatch.setattr("eval.run.job.Job._load", lambda self: pytest.fail("weights are read"))

    def ask(verb, *options):
        call = [verb, str(config), "--out", str(out), *options]
        return CliRunner().invoke(app, call)

    status = ask("status")
    assert status.exit_code == 0
    if content is None:  # a lost file is not done, and is made again
        assert "1 units, 0 done, 0 stale, 0 running, 1 begun" in status.output
        return
    assert "0 done, 0 stale, 0 running, 0 begun, 0 failed, 1 damaged" in status.output
    for done in (status, ask("run", "--data", str(drawn)), ask("table")):
        assert said in done.output
        assert str(file) in done.output
        assert not isinstance(done.exception, (TypeError, KeyError, AttributeError))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
def test_whatever_stops_a_run_the_hint_is_the_same(table, drawn, tmp_path, monkeypatch, number):
    def stopped(*_):
        os.kill(os.getpid(), number)

    for moment in ("eval.run.job.Job._load", "eval.results.shelf.Shelf.state"):  # and hashing
        with monkeypatch.context() as patched:
            patched.setattr(moment, stopped)
            done = call(table("pope"), "--data", drawn, "--out", tmp_path / "out")
        assert done.exit_code == 128 + number
        assert f"stopped by {number.name}; the same command goes on from here" in done.stderr


@pytest.mark.parametrize(
    "line",
    [
        '{"key": "KEY", "answer": {"text": "yes"}}',
        '{"key": "KEY", "answer": {"text": "yes", "generated": "2"}}',
        '{"key": "KEY", "answer": {"text": "no", "generated": 2}, "sum": "SUM"}',
        '{"key": "KEY", "answer": [1]}',
        '{"key": "KEY"}',
        "[1]",
    ],
)
def test_a_journal_line_that_is_whole_but_wrong_is_asked_again(tmp_path, caplog, line):
    from llava_hivtp.answer import Answer

    path = tmp_path / "unit.journal.jsonl"
    journal = Journal(path, "identity")
    journal.add([(instance(0), Answer("yes", 2))])
    journal.close()
    written = json.loads(path.read_text())
    for name, value in (("KEY", written["key"]), ("SUM", written["sum"])):
        line = line.replace(name, value)
    path.write_text(line + "\n")
    assert Journal(path, "identity").get(instance(0)) is None
    assert "1 damaged lines ignored" in caplog.text


def test_a_journal_of_an_earlier_version_has_no_sums_and_is_read(tmp_path):
    from llava_hivtp.answer import Answer

    path, answer = tmp_path / "unit.journal.jsonl", Answer("yes", 2, 16, 0, 16)
    journal = Journal(path, "identity")
    journal.add([(instance(0), answer)])
    journal.close()
    written = json.loads(path.read_text())
    del written["sum"]
    path.write_text(json.dumps(written) + "\n")
    assert Journal(path, "identity").get(instance(0)) == answer


@pytest.mark.slow
def test_the_benchmarks_tasks_are_those_lmms_eval_finds_by_itself():
    from lmms_eval.tasks import TaskManager

    every = TaskManager("WARNING", str(official.OWN_TASKS)).task_index
    ours = official._manager().task_index
    assert {task: ours[task]["yaml_path"] for task in BENCHMARKS} == {
        task: every[task]["yaml_path"] for task in BENCHMARKS
    }
