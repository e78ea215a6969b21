"""Who may import whom: methods know no model, tables know no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "llava_hivtp"


def imported(path):
    """Top-level names of what a file imports, and the project's own modules in full."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
    return {
        name if name.startswith(("llava_hivtp", "eval")) else name.split(".")[0] for name in names
    }


PRUNERS = [p for p in (LIBRARY / "pruners").glob("*.py") if p.name != "__init__.py"]


@pytest.mark.parametrize("path", PRUNERS, ids=lambda p: p.stem)
def test_a_method_imports_torch_and_no_other_method(path):
    allowed = {"llava_hivtp.vision", "llava_hivtp.importance", "llava_hivtp.pruners.base"}
    names = imported(path)
    assert not names & {"llava", "transformers", "lmms_eval"}
    assert {name for name in names if name.startswith("llava_hivtp")} <= allowed


@pytest.mark.parametrize("name", ["vision", "importance"])
def test_the_core_knows_neither_llava_nor_a_method(name):
    names = imported(LIBRARY / f"{name}.py")
    assert not names & {"llava", "transformers", "lmms_eval"}
    assert not any(n.startswith("llava_hivtp.pruners") for n in names)


def test_only_the_plug_in_knows_lmms_eval():
    users = {p.name for p in LIBRARY.rglob("*.py") if "lmms_eval" in imported(p)}
    assert users <= {"lmms.py"}


def test_the_library_never_imports_the_evaluation():
    for path in LIBRARY.rglob("*.py"):
        assert not any(n.split(".")[0] == "eval" for n in imported(path)), path


def test_methods_run_without_llava():
    code = (
        "import sys; from llava_hivtp import build_pruner; build_pruner('hivtp');"
        "assert not {'llava', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
