"""Kill an evaluation at random moments: `python scripts/kill_runs.py [KILLS] [SEED]`.

Two processes share the units of a small table of the embedded model. Once either has begun to
write, both are killed (SIGKILL) after a random time, and started again, until the table is whole.
It must be the table of one undisturbed process, and no other file may be left. Then it starts over,
until there were as many kills as were asked for. Exit status 1 if a table or a file differs.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = """\
title: Killed
models: ['{model}']
layout: unpad
patches: 144
tasks: [pope, ocrbench, mmbench_en_dev_static]
protocol: {{pope: accuracy, ocr: points of 1000, mmb: static}}
rows:
  - {{id: full, pruner: none, block: 100}}
  - {{id: hivtp, pruner: hivtp, r: 2, k: 25, c: 2, layers: [4, 5], block: 50}}
"""
LONGEST = 6.0  # seconds from the first write to a kill


def main(kills: int, seed: int) -> int:
    """Run, kill and compare; returns the exit status."""
    moment = random.Random(seed)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        config, data = folder / "table.yaml", folder / "data"
        config.write_text(TABLE.format(model=ROOT / "eval/nano/checkpoints/nodrop"))
        _eval("eval.nano", "data", "--out", data)
        whole = folder / "whole"
        _start(config, data, whole).wait()
        expected = _contents(config, whole)
        print(f"undisturbed: {len(expected[0])} files, a table of {len(expected[1])} cells")
        done, different, rounds = 0, 0, 0
        while done < kills:
            rounds += 1
            done = _round(folder, rounds, done, kills, moment)
            equal = _contents(config, folder / f"round{rounds}") == expected
            different += not equal
            print(f"round {rounds}: {'table and files are equal' if equal else 'DIFFERENT'}")
        print(f"{done} kills in {rounds} rounds: {different} different tables or leftover files")
    return 1 if different else 0


def _round(folder: Path, number: int, done: int, kills: int, moment: random.Random) -> int:
    """Start and kill until the table is whole; returns how many kills there were by then."""
    out = folder / f"round{number}"
    while True:
        processes = [_start(folder / "table.yaml", folder / "data", out) for _ in range(2)]
        before, wait = _written(out), moment.uniform(0, LONGEST)
        while _written(out) == before and _alive(processes):
            time.sleep(0.01)
        time.sleep(wait)
        if done == kills or not _alive(processes):
            for process in processes:
                process.wait()
            return done
        for process in processes:
            process.kill()
            process.wait()
        done += 1
        print(f"  kill {done}, {wait:.2f} s after the first write: {_found(out)}", flush=True)


def _alive(processes: list[subprocess.Popen[bytes]]) -> bool:
    return any(process.poll() is None for process in processes)


def _found(out: Path) -> str:
    files = [file for file in out.rglob("*") if file.is_file()]
    lines = sum(f.read_bytes().count(b"\n") for f in files if f.name.endswith("journal.jsonl"))
    results = sum(f.suffix == ".json" for f in files)
    half = sum(f.suffix == ".tmp" for f in files)
    return f"{results} units done, {lines} answers in journals, {half} files half written"


def _written(out: Path) -> float:
    """When a result or a journal was last written."""
    files = [*out.rglob("*.json"), *out.rglob("*.jsonl")] if out.is_dir() else []
    return max((file.stat().st_mtime for file in files if file.exists()), default=0.0)


def _contents(config: Path, out: Path) -> tuple[list[str], list[str]]:
    """All files of a folder, and every cell of its table."""
    files = sorted(str(f.relative_to(out)) for f in out.rglob("*") if f.is_file())
    return files, _eval("eval", "table", config, "--out", out, "--format", "csv").splitlines()


def _start(config: Path, data: Path, out: Path) -> subprocess.Popen[bytes]:
    call = [sys.executable, "-m", "eval", "run", config, "--data", data, "--out", out]
    call += ["--no-timing", "--batch", "2"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(list(map(str, call)), env=_environment(), **quiet)


def _eval(module: str, *arguments: object) -> str:
    call = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(call, env=_environment(), capture_output=True, text=True, check=True)
    return done.stdout


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:3]]
    sys.exit(main(*numbers, *(20, 0)[len(numbers) :]))
