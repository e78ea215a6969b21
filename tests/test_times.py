"""Times one can believe: intervals, what disturbs them is noticed, and the table says so."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import t as student
from typer.testing import CliRunner

from eval import clock
from eval.__main__ import app
from eval.clock import Watch
from eval.results import times
from eval.results.records import Timing

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


def timing(samples, **more):
    numbers = np.array(samples, float)
    return Timing(
        requests=len(samples),
        warmup=0,
        ttft_ms=1000 * numbers[:, 0].mean(),
        throughput=numbers[:, 2].sum() / numbers[:, 1].sum(),
        samples=[list(map(float, sample)) for sample in samples],
        protocol={},
        provenance={},
        **more,
    )


def test_an_interval_is_students():
    found = times.interval("ttft_ms", [timing([(0.1, 1, 4), (0.2, 1, 4), (0.3, 1, 4)])])
    half = student.ppf(0.975, 2) * 100 / 3**0.5
    assert found == pytest.approx((max(0, 200 - half), 200 + half))


def test_two_tasks_of_equal_spread_have_the_freedom_of_both():
    one = timing([(0.1, 1, 4), (0.2, 1, 4), (0.3, 1, 4)])
    low, high = times.interval("ttft_ms", [one, one])
    assert (high - low) / 2 == pytest.approx(student.ppf(0.975, 4) * 100 / 6**0.5)


@pytest.mark.parametrize("column", ["ttft_ms", "throughput"])
def test_intervals_cover_the_truth_as_often_as_they_say(column):
    rng, inside, rounds = np.random.default_rng(0), 0, 2000
    for _ in range(rounds):
        ttft = rng.lognormal(0, 0.2, 20)
        tokens = rng.integers(1, 9, 20)
        seconds = ttft + tokens * rng.lognormal(-2, 0.2, 20)
        low, high = times.interval(column, [timing(list(zip(ttft, seconds, tokens, strict=True)))])
        mean, step = np.exp(0.02), np.exp(-2 + 0.02)
        truth = 1000 * mean if column == "ttft_ms" else 4.5 / (mean + 4.5 * step)
        inside += low <= truth <= high
    assert 0.92 <= inside / rounds <= 0.97


def test_a_single_request_has_no_interval():
    assert times.interval("ttft_ms", [timing([(0.1, 1, 4)])]) is None
    assert times.interval("ttft_ms", []) is None
    assert times.paired_ratio(timing([(0.1, 1, 4)]), timing([(0.1, 1, 4)])) is None


def test_a_ratio_is_taken_request_by_request():
    base = timing([(0.1, 1, 4), (0.4, 1, 4), (0.2, 1, 4)])
    ours = timing([(0.05, 1, 4), (0.2, 1, 4), (0.1, 1, 4)])
    assert times.paired_ratio(ours, base) == pytest.approx((0.5, 0))
    assert times.paired_ratio(ours, timing([(0.1, 1, 4)] * 2)) is None


def test_notes_say_over_how_many_requests_and_what_was_amiss():
    quiet = timing([(0.1, 1, 4), (0.101, 1, 4)] * 4, preparation_ms=5.0, warnings=[])
    odd = timing([(0.1, 1, 4), (0.3, 1, 4)], preparation_ms=7.0, warnings=["others: 60 %"])
    said = times.notes({"a": {"pope": quiet}, "b": {"pope": odd}, "c": {}})
    assert "2 to 8 requests per row and task" in said[0]
    assert "preparing took 6.0 ms more" in said[1]
    assert [line.partition(" (")[0] for line in said[2:]] == [
        "WARNING: others",
        "WARNING: TTFT is uncertain by more than 10%",
    ]
    assert all("(b)" in line for line in said[2:])
    assert times.notes({"a": {}}) == []
    (alone,) = times.notes({"a": {"pope": timing([(0.1, 1, 4), (0.1, 1, 4)])}})  # an older file
    assert "2 requests" in alone


# What disturbs


def spin(seconds):
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


@contextmanager
def busy_loops(count=2):
    """Processes that never rest, on the one core where this thread runs, too."""
    before = os.sched_getaffinity(0)
    core = {min(before)}
    os.sched_setaffinity(0, core)
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        time.sleep(0.2)
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
        os.sched_setaffinity(0, before)


def test_busy_loops_beside_a_timed_call_are_noticed():
    watch = Watch(CPU)
    with busy_loops():
        for _ in range(5):
            with watch:
                spin(0.05)
    assert watch.share < 0.7
    (warning,) = watch.warnings()
    assert warning.startswith("others used this CPU: timed calls worked")


def test_what_happens_between_timed_calls_is_no_matter():
    watch = Watch(CPU)
    watch.wall, watch.worked = 10.0, 9.9
    time.sleep(0.05)
    assert watch.share == pytest.approx(0.99)
    assert watch.warnings() == []


@pytest.mark.parametrize(
    ("processes", "slowed", "expected"),
    [
        ("", "Not Active; Not Active", []),
        ("{own}", "Not Active; Not Active", []),
        ("77", "Not Active; Not Active", []),  # ours, numbered from outside a container
        ("{own}\n77", "Not Active; Not Active", ["other processes were on this GPU"]),
        ("76\n77", "Not Active; Not Active", ["other processes were on this GPU"]),
        ("{own}", "Not Active; Active", ["the GPU lowered its clocks: heat or power"]),
    ],
)
def test_a_gpu_is_asked_who_else_is_there_and_how_fast_it_runs(
    monkeypatch, processes, slowed, expected
):
    def driver(device, query):
        assert device == GPU
        return processes.format(own=os.getpid()) if "apps" in query else slowed

    monkeypatch.setattr(clock, "nvidia_smi", driver)
    watch = Watch(GPU)
    watch.wall, watch.worked = 10.0, 1.0  # waiting for a GPU is no work
    assert watch.warnings() == expected


def test_a_machine_without_the_drivers_tool_gives_no_warning(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert Watch(GPU).warnings() == []


def test_a_table_of_disturbed_times_says_so(table, drawn, tmp_path):
    """Two busy loops beside a timed run: through the commands, to the printed table."""
    config, out = table("pope", rows=("full", "hivtp")), tmp_path / "out"
    words = ["--data", str(drawn), "--out", str(out), "--limit", "4", "--timing-n", "4"]
    with busy_loops():
        done = CliRunner().invoke(app, ["run", str(config), *words])
    assert done.exit_code == 0, done.output
    shown = CliRunner().invoke(app, ["table", str(config), "--out", str(out), "--limit", "4"])
    assert "WARNING: others used this CPU (full, hivtp)" in shown.output
    assert "4 requests per row and task" in shown.output
    assert "preparation ms" in shown.output
    ours = next(line for line in shown.output.splitlines() if "[" in line and "ours" in line)
    assert ours.count("[") >= 2


def test_the_demos_last_line_says_what_its_times_are():
    from eval.nano import summary

    full = timing([(0.02, 1, 4), (0.021, 1, 4)] * 4, warnings=[])
    ours = timing([(0.01, 1, 4), (0.0105, 1, 4)] * 4, warnings=["others used this CPU"])
    found = {"full": full, "hivtp-25": ours}
    shelf = SimpleNamespace(
        rows=[SimpleNamespace(id=name) for name in found],
        unit=lambda row, task: row.id,
        timing=found.get,
    )
    line, warning = summary._first_tokens(shelf, "full", "hivtp-25", "at 25 %")
    assert line == (
        "first token: 20.5 ± 0.4 ms unpruned, 10.2 ± 0.2 ms at 25 %; ratio 0.50 ± 0.00 "
        "(means of 8 requests, in turn; ± of 95 %)"
    )
    assert warning == "WARNING: others used this CPU: no measurement"
