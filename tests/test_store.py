"""A result is whole or absent, and a lock lives as long as its process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eval.results import store

ROOT = Path(__file__).resolve().parent.parent
RESULT = {
    "unit": {},
    "score": 50.0,
    "metrics": {},
    "requests": 2,
    "tokens": {"patches": 1, "newlines": 0, "total": 2, "generated": 1},
    "protocol": {},
    "provenance": {},
    "seconds": 1.0,
}


def python(code: str, *arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "new" / "folders" / "pope.json"
    store.write_json_atomic(path, RESULT)
    assert store.read_result(path) == RESULT
    assert store.state(path) == "done"


def test_files_of_a_unit_share_its_stem(tmp_path):
    assert store.beside(tmp_path / "pope.json", "lock") == tmp_path / "pope.lock"
    dry = tmp_path / "pope.limit8.json"
    assert store.beside(dry, "samples.jsonl") == tmp_path / "pope.limit8.samples.jsonl"


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_file_cut_short_is_missing(tmp_path, share):
    path = tmp_path / "pope.json"
    store.write_json_atomic(path, RESULT)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole)) - 2 if share else 0])
    assert store.read_result(path) is None
    assert store.state(path) == "missing"


@pytest.mark.parametrize("content", [b"[]", b"null", b'{"score": 1}', b"\xff\xfe", b"nul\0"])
def test_a_file_of_something_else_is_missing(tmp_path, content):
    path = tmp_path / "pope.json"
    path.write_bytes(content)
    assert store.read_result(path) is None


def test_answers_keep_their_control_characters(tmp_path):
    answers = ["a\nb", "nul\0", "line\u2028sep", "lone \ud800", "\x1b[31m", '"\\']
    path = tmp_path / "pope.json"
    samples = [{"doc_id": i, "answer": a, "score": 1.0, "group": i} for i, a in enumerate(answers)]
    store.write_jsonl_atomic(store.beside(path, "samples.jsonl"), samples)
    assert store.read_samples(path) == samples


def test_damaged_samples_are_no_samples(tmp_path):
    path = tmp_path / "pope.json"
    file = store.beside(path, "samples.jsonl")
    assert store.read_samples(path) is None
    sample = {"doc_id": 0, "answer": "yes", "score": 1.0, "group": 0}
    store.write_jsonl_atomic(file, [sample, sample])
    file.write_bytes(file.read_bytes()[:-9])
    assert store.read_samples(path) is None
    store.write_jsonl_atomic(file, [{"doc_id": 0}])
    assert store.read_samples(path) is None


def test_kill_9_while_writing_leaves_a_whole_file(tmp_path):
    path = tmp_path / "pope.json"
    code = """
import sys
from pathlib import Path
from eval.results.store import write_json_atomic
for i in range(10**6):
    write_json_atomic(Path(sys.argv[1]), {"i": i, "weight": ["x" * 50] * 20000})
    if i == 0:
        print("started", flush=True)
"""
    for wait in (0.0, 0.011, 0.029):
        writer = python(code, path)
        assert writer.stdout.readline() == "started\n"
        time.sleep(wait)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        assert len(json.loads(path.read_bytes())["weight"]) == 20000


def test_a_full_disk_keeps_the_old_file_and_says_so(tmp_path):
    path = tmp_path / "pope.json"
    store.write_json_atomic(path, RESULT)
    code = """
import resource, signal, sys
from pathlib import Path
from eval.results.store import write_json_atomic
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
write_json_atomic(Path(sys.argv[1]), ["x" * 100] * 1000)
"""
    writer = python(code, path)
    _, error = writer.communicate()
    assert writer.returncode == 1
    assert "OSError" in error
    assert store.read_result(path) == RESULT
    assert os.listdir(tmp_path) == ["pope.json"]


HOLD = """
import sys, time
from pathlib import Path
from eval.results.store import locked
with locked(Path(sys.argv[1])) as mine:
    print(mine, flush=True)
    time.sleep(60)
"""


def test_a_unit_belongs_to_one_process_until_that_dies(tmp_path):
    path = tmp_path / "pope.json"
    holder = python(HOLD, path)
    assert holder.stdout.readline() == "True\n"
    assert store.state(path) == "running"
    with store.locked(path) as mine:
        assert not mine
    assert store.state(path) == "running"  # who was turned away took nothing with it
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert store.state(path) == "missing"
    with store.locked(path) as mine:
        assert mine


def test_a_lock_leaves_nothing_behind(tmp_path):
    path = tmp_path / "pope.json"
    for _ in range(2):
        with store.locked(path) as mine:
            assert mine
    with pytest.raises(RuntimeError), store.locked(path):
        raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_only_one_of_many_processes_works_at_a_time(tmp_path):
    code = """
import sys, time
from pathlib import Path
from eval.results.store import locked
path, log = Path(sys.argv[1]), open(sys.argv[2], "a", buffering=1)
for _ in range(30):
    with locked(path) as mine:
        if mine:
            log.write("in\\n")
            time.sleep(0.001)
            log.write("out\\n")
"""
    log = tmp_path / "log"
    workers = [python(code, tmp_path / "pope.json", log) for _ in range(3)]
    assert [worker.wait() for worker in workers] == [0, 0, 0]
    words = log.read_text().split()
    assert len(words) > 60
    assert words == ["in", "out"] * (len(words) // 2)


def test_asking_for_the_state_does_not_turn_a_worker_away(tmp_path):
    path = tmp_path / "pope.json"
    code = """
import sys
from pathlib import Path
from eval.results.store import state
print("ready", flush=True)
while True:
    state(Path(sys.argv[1]))
"""
    asker = python(code, path)
    asker.stdout.readline()
    try:
        for _ in range(300):
            with store.locked(path) as mine:
                assert mine
    finally:
        asker.kill()
        asker.wait()


def test_a_failure_is_shown_with_its_reason_and_never_as_done(tmp_path):
    path = tmp_path / "pope.json"
    record = store.beside(path, "failed.json")
    store.write_json_atomic(record, {"error": "ValueError: no data", "traceback": "", "date": ""})
    assert store.state(path) == "failed"
    assert store.failure(path) == "ValueError: no data"
    record.write_text("{")
    assert store.state(path) == "failed"
    assert "cannot be read" in store.failure(path)
    store.write_json_atomic(path, RESULT)
    assert store.state(path) == "done"
