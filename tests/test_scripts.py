"""What the scripts say when they cannot start."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SUBMIT = Path(__file__).parents[1] / "scripts/slurm/submit.sh"


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ((), 2, "usage: bash scripts/slurm/submit.sh table1"),
        (("table9",), 2, "got 'table9'"),
        (("table1",), 1, "no sbatch here: run it where jobs are submitted"),
    ],
)
def test_submitting_says_what_is_missing(tmp_path, arguments, status, words):
    for name in ("dirname", "mkdir"):
        (tmp_path / name).symlink_to(shutil.which(name))
    run = subprocess.run(
        [shutil.which("bash"), SUBMIT, *arguments],
        env={"PATH": str(tmp_path), "OUT": str(tmp_path / "out")},
        capture_output=True,
        text=True,
    )
    assert run.returncode == status
    assert words in run.stderr
    assert len(run.stderr.splitlines()) == 1
    assert not os.path.exists(tmp_path / "out")
