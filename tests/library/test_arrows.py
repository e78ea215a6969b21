"""Who may import whom: the contracts of `.importlinter` hold, and they bite."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINT = Path(sys.executable).with_name("lint-imports")


def lint(checkout):
    command = [LINT, "--no-logo", "--no-cache"]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True)


def test_the_contracts_hold():
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("llava_hivtp/vision.py", "from eval import ROOT", "The library never imports"),
        ("llava_hivtp/vision.py", "import transformers", "Methods need torch alone"),
        ("llava_hivtp/cli.py", "import lmms_eval", "The plug-in alone"),
        ("llava_hivtp/pruners/fopru.py", "import llava_hivtp.pruners.hired", "No method knows"),
        ("llava_hivtp/importance.py", "import llava_hivtp.pruners", "Loading knows models"),
        ("eval/report/text.py", "from eval.run import job", "Nothing knows a verb"),
        ("eval/results/store.py", "from eval.results import records", "imports itself round"),
        ("eval/stray.py", "", "Nothing knows a verb"),
    ],
)
def test_a_contract_bites(tmp_path, file, line, contract):
    shutil.copy(ROOT / ".importlinter", tmp_path)
    python_only = shutil.ignore_patterns("*.json*", "*.safetensors", "*.png", "__pycache__")
    for package in ("llava_hivtp", "eval"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=python_only)
    with (tmp_path / file).open("a") as source:
        source.write(f"\n{line}\n")
    done = lint(tmp_path)
    broken = [found for found in done.stdout.splitlines() if "BROKEN" in found]
    assert done.returncode == 1
    assert any(contract in found for found in broken), done.stdout


def test_methods_run_without_llava():
    code = (
        "import sys; from llava_hivtp import build_pruner; build_pruner('hivtp');"
        "assert not {'llava', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
