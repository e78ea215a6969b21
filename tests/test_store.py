"""A result is whole or absent, and a lock lives as long as its process."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from eval.results import records, store
from eval.results.records import Failure, RecordError, Result, Sample, Tokens

ROOT = Path(__file__).resolve().parent.parent
RESULT = Result(
    unit={},
    score=50.0,
    metrics={},
    requests=2,
    tokens=Tokens(1, 0, 2, 1),
    protocol={},
    provenance={},
    seconds=1.0,
)


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
    records.write_result(path, RESULT)
    assert records.read_result(path) == RESULT


def test_files_of_a_unit_share_its_stem(tmp_path):
    assert store.beside(tmp_path / "pope.json", "lock") == tmp_path / "pope.lock"
    dry = tmp_path / "pope.limit8.json"
    assert store.beside(dry, "samples.jsonl") == tmp_path / "pope.limit8.samples.jsonl"


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_file_cut_short_is_absent(tmp_path, share):
    path = tmp_path / "pope.json"
    records.write_result(path, RESULT)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole)) - 2 if share else 0])
    assert records.read_result(path) is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "holds [], no Result"),
        ("null", "holds None, no Result"),
        ('{"score": 1}', "is no Result: 'unit' is missing"),
        ({"protocol": 5}, "'protocol' cannot be 5"),
        ({"score": "50"}, "'score' cannot be '50'"),
        ({"score": True}, "'score' cannot be True"),
        ({"score": math.nan}, "'score' cannot be nan"),
        ({"requests": 2.5}, "'requests' cannot be 2.5"),
        ({"tokens": {"patches": 1}}, "is no Tokens: 'newlines' is missing"),
        ({"metrics": {"a": []}}, "'metrics' cannot be {'a': []}"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_a_file_of_something_else_is_an_error_that_names_it(tmp_path, content, said):
    path = tmp_path / "pope.json"
    path.write_text(content if isinstance(content, str) else json.dumps(asdict(RESULT) | content))
    with pytest.raises(RecordError) as error:
        records.read_result(path)
    assert str(path) in str(error.value)
    assert said in str(error.value)


def stored(path, answers):
    """A result with samples."""
    samples = [Sample(doc_id=i, answer=a, score=1.0, group=str(i)) for i, a in enumerate(answers)]
    digest = records.write_samples(path, samples)
    result = replace(RESULT, requests=len(samples), samples=digest)
    records.write_result(path, result)
    return result, samples


def test_answers_keep_their_control_characters(tmp_path):
    answers = ["a\nb", "nul\0", "line\u2028sep", "lone \ud800", "\x1b[31m", '"\\']
    path = tmp_path / "pope.json"
    result, samples = stored(path, answers)
    assert records.read_samples(path, result) == samples
    older = replace(result, samples=None)
    assert records.read_samples(path, older) == samples


def test_samples_that_are_lost_or_cut_short_are_absent(tmp_path):
    path = tmp_path / "pope.json"
    result, _ = stored(path, ["yes", "no"])
    file = store.beside(path, "samples.jsonl")
    file.write_bytes(file.read_bytes()[:-9])
    assert records.read_samples(path, result) is None
    file.unlink()
    assert records.read_samples(path, result) is None
    assert not records.has_samples(path, result)


def test_an_altered_answer_is_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "pope.json"
    result, _ = stored(path, ["yes", "no"])
    file = store.beside(path, "samples.jsonl")
    file.write_bytes(file.read_bytes().replace(b'"no"', b'"on"'))
    for read in (records.read_samples, records.has_samples):
        with pytest.raises(RecordError, match="pope.samples.jsonl is not what pope.json was"):
            read(path, result)
    older = replace(result, samples=None)  # nothing recorded to compare with
    assert [sample.answer for sample in records.read_samples(path, older)] == ["yes", "on"]
    file.write_bytes(file.read_bytes().replace(b'"score": 1.0', b'"score": []'))
    with pytest.raises(RecordError, match=r"pope.samples.jsonl:1: 'score' cannot be \[\]"):
        records.read_samples(path, older)


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
    records.write_result(path, RESULT)
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
    assert f"File too large: '{path}'" in error
    assert records.read_result(path) == RESULT
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
    assert store.held(path)
    with store.locked(path) as mine:
        assert not mine
    assert store.held(path)  # who was turned away took nothing with it
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert not store.held(path)
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


def test_asking_who_holds_a_unit_does_not_turn_a_worker_away(tmp_path):
    path = tmp_path / "pope.json"
    code = """
import sys
from pathlib import Path
from eval.results.store import held
print("ready", flush=True)
while True:
    held(Path(sys.argv[1]))
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


def test_what_a_killed_process_left_half_written_goes_with_the_next_lock(tmp_path):
    path, dry = tmp_path / "pope.json", tmp_path / "pope.limit8.json"
    code = """
import os, sys
from pathlib import Path
from eval.results import records, store
from eval.results.records import Failure, RecordError, Result, Sample, Tokens
os.replace = lambda *_: os.kill(os.getpid(), 9)
store.write_json_atomic(Path(sys.argv[1]), {})
"""
    names = [store.beside(path, kind) for kind in store.KINDS]
    for name in (*names, dry):
        assert python(code, name).wait() == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 5
    with store.locked(path) as mine:
        assert mine
    assert [name.partition(".json")[0] for name in os.listdir(tmp_path)] == [".pope.limit8"]
    store.tidy(dry)
    assert os.listdir(tmp_path) == []


def test_a_record_of_a_failure_that_cannot_be_read_is_a_failure(tmp_path):
    path = tmp_path / "pope.json"
    file = store.beside(path, "failed.json")
    assert records.read_failure(path) is None
    records.write_failure(path, Failure("ValueError: no data"))
    assert records.read_failure(path).error == "ValueError: no data"
    file.write_text("[1]")
    assert records.read_failure(path).error == f"{file} holds [1], no Failure"
    file.write_text("{")
    assert "was cut short" in records.read_failure(path).error
