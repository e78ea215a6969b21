"""A run: every unit once, every failure seen, nothing lost."""

from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import external_pruner
import pytest
from typer.testing import CliRunner

from eval.__main__ import app
from eval.benchmarks import data as datasets
from eval.benchmarks.record import Part
from eval.benchmarks.records import BENCHMARKS
from eval.plan.table import load_table
from eval.plan.units import units
from eval.results import identity, store
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
        table = load_table(config)
        return Job(table, units(table, tmp_path / "out", limit=limit), drawn, **settings)

    return make


def test_a_run_fills_a_table_and_runs_nothing_twice(table, drawn, tmp_path, monkeypatch):
    config, out = table("pope, ocrbench"), tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    arguments = (config, "--data", drawn, "--out", "out", "--limit", 4, "--timing-n", 2)
    done = call(*arguments, "--batch", 3)
    assert done.exit_code == 0, done.output
    assert Path.cwd() == tmp_path
    full, hivtp = (
        sorted(folder.rglob("*.limit4.json")) for folder in sorted((out).glob("*/*"))[::-1]
    )
    results = [store.read_result(path) for path in [*full, *hivtp]]
    assert [r["unit"]["task"] for r in results] == ["ocrbench", "pope"] * 2
    assert [r["tokens"]["patches"] for r in results] == [16, 16, 8, 8]
    assert {r["tokens"]["total"] for r in results} == {16}
    assert all(r["requests"] == 4 and r["protocol"]["batch size"] == 3 for r in results)
    assert all(len(store.read_samples(path)) == 4 for path in [*full, *hivtp])
    timings = [store.read_timing(path) for path in [*full, *hivtp]]
    assert all(t["requests"] == 2 and t["ttft_ms"] > 0 for t in timings)
    assert not [*out.rglob("*.journal.jsonl"), *out.rglob("*.failed.json"), *out.rglob("*.lock")]

    monkeypatch.setattr(
        "eval.run.job.Job._load", lambda self: pytest.fail("the model is loaded again")
    )
    assert call(*arguments).exit_code == 0


def test_ocrbench_counts_from_zero_every_time(job, table):
    """Its points lie in a global of its module: a second evaluation would double them."""
    from llava_hivtp.lmms import Answer

    todo = job(table("ocrbench", rows=("full", "hivtp")), limit=3)
    load = Job._load

    def gold(self):
        worker = load(self)
        texts = ["".join(doc) for doc in _answers(worker.folder)]
        worker.lm.read = lambda instance: instance
        worker.lm._answer_all = lambda batch: [Answer(texts[i.args[3]], 1) for i in batch]
        return worker

    todo._load = lambda: gold(todo)
    assert todo.run() == 0
    assert [store.read_result(unit.path)["score"] for unit in todo.units] == [0.3, 0.3]


def _answers(folder):
    from pyarrow import parquet

    (file,) = datasets.files(folder, BENCHMARKS["ocrbench"].data[0])
    return parquet.read_table(file, columns=["answer"]).column("answer").to_pylist()


def test_a_failed_unit_is_recorded_and_the_others_go_on(table, drawn, tmp_path):
    """One row asks for a layer that the tower lacks."""
    config = table("pope", rows=("deep", "full"))
    arguments = (config, "--data", drawn, "--out", tmp_path / "out", "--limit", 2, "--no-timing")
    done = call(*arguments)
    assert done.exit_code == 1
    deep, full = units(load_table(config), tmp_path / "out", limit=2)
    assert store.state(full.path) == "done"
    assert store.state(deep.path) == "failed"
    assert "layers [9] lie outside 1..4" in store.failure(deep.path)
    assert "layers [9] lie outside 1..4" in store.beside(deep.path, "failed.json").read_text()

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
    pope, ocrbench = todo.units
    assert store.state(ocrbench.path) == "done"
    assert f"pope: document {last} cannot be read" in store.failure(pope.path)
    journal = store.beside(pope.path, "journal.jsonl").read_text().splitlines()
    assert journal  # what was answered before is not lost


def test_an_answer_may_hold_any_character(job, table):
    from llava_hivtp.lmms import Answer

    todo = job(table("pope", rows=("full",)))
    load, text = Job._load, 'yes\x00\x07\x1b[31m\u2028"\\\N{CHICKEN}\n'

    def odd(self):
        worker = load(self)
        worker.lm._answer_all = lambda batch: [Answer(text, 3) for _ in batch]
        return worker

    todo._load = lambda: odd(todo)
    assert todo.run() == 0
    samples = store.read_samples(todo.units[0].path)
    assert [sample["answer"] for sample in samples] == [text, text]


def test_a_result_cut_in_half_is_run_again(job, table):
    todo = job(table("pope", rows=("full",)))
    assert todo.run() == 0
    (unit,) = todo.units
    before = store.read_result(unit.path)
    unit.path.write_bytes(unit.path.read_bytes()[: unit.path.stat().st_size // 2])
    assert store.state(unit.path) == "missing"
    assert todo.run() == 0
    again = store.read_result(unit.path)
    assert {key: again[key] for key in ("score", "tokens", "protocol")} == {
        key: before[key] for key in ("score", "tokens", "protocol")
    }


def test_results_of_another_protocol_are_not_added_to(job, table, drawn):
    first = job(table("pope", rows=("full",)))
    assert first.run() == 0
    second = job(table("pope", rows=("full", "hivtp")), batch=2)
    with pytest.raises(ValueError, match="with batch size 1, this run has 2: choose another --out"):
        second.run()
    assert not store.beside(second.units[1].path, "failed.json").exists()


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
        first = Job(load_table(config), units(load_table(config), disk, limit=2), job(config).data)
        filler = disk / "filler"
        filler.write_bytes(b"0" * (disk_free(disk) - 4096))
        assert first.run() == 1
        assert "No space left on device" in first.failures[first.units[0].path]
        assert store.state(first.units[0].path) in ("missing", "failed")
        filler.unlink()
        second = Job(first.table, first.units, first.data)
        assert second.run() == 0
        assert store.state(first.units[0].path) == "done"
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
    (unit,) = todo.units
    assert store.state(unit.path) == "missing"
    assert not store.beside(unit.path, "failed.json").exists()


def instance(doc_id, prompt="what?", **options):
    return SimpleNamespace(
        args=(prompt, {"max_new_tokens": 16} | options, None, doc_id, "pope", "test")
    )


def test_a_journal_knows_equal_requests_only(tmp_path):
    from llava_hivtp.lmms import Answer

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
    from llava_hivtp.lmms import Answer

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


def test_digests_change_with_what_they_stand_for(tmp_path, monkeypatch):
    library = tmp_path / "llava_hivtp"
    shutil.copytree(Path(identity.ROOT) / "llava_hivtp", library)
    monkeypatch.setattr(identity, "ROOT", tmp_path)
    own = Path(external_pruner.__file__)
    before = identity.sources_digest(own)
    (library / "README.md").write_text("words")
    assert identity.sources_digest(own) == before
    edit(library / "pruners" / "hivtp.py")
    assert identity.sources_digest(own) == before  # another method's file
    edit(library / "vision.py")
    assert identity.sources_digest(own) != before
    own = library / "pruners" / "hivtp.py"
    before = identity.sources_digest(own)
    edit(own)
    assert identity.sources_digest(own) != before

    large = tmp_path / "model.safetensors"
    large.write_bytes(bytes(identity.WHOLE + 1))
    before = identity.digest_files(tmp_path, [large])
    with large.open("r+b") as file:
        file.seek(identity.WHOLE)
        file.write(b"1")
    assert identity.digest_files(tmp_path, [large]) != before


def edit(path):
    path.write_text(path.read_text() + "\n# edited\n")


@pytest.mark.parametrize("name", ["sources_digest", "checkpoint_digest"])
def test_another_source_or_checkpoint_voids_what_was_done(table, job, monkeypatch, name):
    class Loaded(BaseException):
        pass

    def load(self):
        raise Loaded

    config = table("pope", rows=("full",))
    assert job(config, timing_n=1).run() == 0
    monkeypatch.setattr("eval.run.job.Job._load", load)
    assert job(config, timing_n=1).run() == 0  # nothing is left to do
    monkeypatch.setattr(f"eval.results.stale.{name}", lambda _: "another")
    with pytest.raises(Loaded):
        job(config, timing_n=1).run()


class Slow:
    """Answers in a known time: 20 ms to the first token, 10 ms for each other."""

    def __init__(self):
        self.answered = []

    def read(self, instance):
        return instance

    def answer(self, requests, streamer):
        from llava_hivtp.lmms import Answer

        (request,) = requests
        self.answered.append(request)
        streamer.put(None)  # the prompt
        time.sleep(0.02)
        streamer.put(None)
        for _ in range(3):
            time.sleep(0.01)
            streamer.put(None)
        streamer.end()
        return [Answer("yes", 4)]


def test_times_are_those_of_single_requests():
    lm = Slow()
    times = timing.time_requests(lm, list(range(8)))
    assert lm.answered == [*range(timing.WARMUP), *range(8)]
    assert (times["requests"], times["warmup"]) == (8, timing.WARMUP)
    ttft, total, generated = zip(*times["samples"], strict=True)
    assert times["ttft_ms"] == pytest.approx(1000 * sum(ttft) / 8)
    assert times["throughput"] == pytest.approx(sum(generated) / sum(total))
    assert all(
        first >= 0.02 and first + 0.03 <= whole for first, whole in zip(ttft, total, strict=True)
    )


def test_a_timed_device_is_alone():
    import torch

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
    now = iter(range(0, 1000, 20))
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    stream = io.StringIO()
    with Progress("full pope", 100, 10, stream) as progress:
        for _ in range(3):
            progress.update(30)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "full pope: 10/100, 10 of them from before"
    assert lines[-1].startswith("full pope: 100/100")
    assert any("left" in line for line in lines[1:-1])
    assert "\r" not in stream.getvalue()
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
    (unit,) = todo.units
    result = json.loads(unit.path.read_text())
    assert result["unit"]["arguments"] == {"r": 2, "k": 25, "c": 2, "layers": [2, 3]}
    assert result["protocol"]["conversation template"] == "vicuna_v1"
    assert result["protocol"]["task"]["measures"] == "accuracy"
    assert set(result["provenance"]) == {"commit", "versions", "device", "date"}
