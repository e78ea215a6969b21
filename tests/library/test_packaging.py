"""The wheel holds the library and nothing else."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="needs setuptools")
def test_the_wheel_holds_the_library_and_imports_from_it(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
        + ["--wheel-dir", str(tmp_path), str(ROOT)],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {t for t in top if not t.endswith(".dist-info")} == {"llava_hivtp"}
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "llava_hivtp").rglob("*.py")}
    assert sources <= set(names)
    code = (
        f"import sys; sys.path.insert(0, {str(wheel)!r}); import llava_hivtp;"
        "assert llava_hivtp.__file__.startswith(sys.path[0]), llava_hivtp.__file__;"
        "print(llava_hivtp.build_pruner('hivtp').budget(1, 576))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True, text=True
    )
    assert run.stdout.strip() == "288"
