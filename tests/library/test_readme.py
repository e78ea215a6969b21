"""What the README prints, runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from llava_hivtp import PRUNERS

ROOT = Path(__file__).parents[2]


def test_the_example_runs_as_printed(tmp_path):
    code = re.search(r"```python\n(.+?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    kept = re.search(r"kept (\d+) of 576 tokens", run.stdout)
    assert 252 <= int(kept[1]) <= 288


def test_the_method_shown_in_full_is_the_file():
    source = (ROOT / "llava_hivtp" / "pruners" / "fopru.py").read_text()
    assert f"```python\n{source}```" in (ROOT / "README.md").read_text()


def test_every_method_is_listed():
    readme = (ROOT / "README.md").read_text()
    assert all(f"`{name}`" in readme for name in PRUNERS)
