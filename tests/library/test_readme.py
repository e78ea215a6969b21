"""What the README prints, runs."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from features import random_features

from llava_hivtp import PRUNERS
from llava_hivtp.pruners import LAYER_PRUNERS

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
    assert all(f"`{name}`" in readme for name in PRUNERS | LAYER_PRUNERS)


def test_the_method_that_asks_runs_as_printed():
    readme = (ROOT / "README.md").read_text()
    source = next(part for part in readme.split("```python\n") if "class MostAsked" in part)
    names = {"__name__": __name__}
    exec(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from torch import Tensor\n"
        "from torch.nn.functional import normalize\n"
        "from llava_hivtp.pruners.base import QuestionPruner\n"
        "from llava_hivtp.vision import VisionFeatures\n" + source.partition("```")[0],
        names,
    )
    features = random_features(3)
    kept = names["MostAsked"](keep=0.25).select(features)
    assert len(kept) == 3 * 36
    other = replace(features, question=-features.question)
    assert not torch.equal(kept.patch, names["MostAsked"](keep=0.25).select(other).patch)


def test_it_opens_with_what_was_shown_and_what_was_not():
    readme = (ROOT / "README.md").read_text()
    first, second = readme.index("\n## Use"), readme.index("\n## Where the time goes")
    for headline in ("make demo", "to the bit", "real weights | **not yet**", "GPU | **not yet**"):
        assert 0 < readme.index(headline) < first
    assert readme.index("\n## Add a method") > second
    tables = [line for line in readme[second:].split("\n## ")[1].splitlines() if "|" in line]
    assert not tables  # long measurements stand in eval/measured
    assert "\npip install" not in readme[:first]  # tables and figures need the checkout


def test_layouts_say_where_the_authors_codes_agree():
    readme = (ROOT / "README.md").read_text()
    (row,) = [line for line in readme.splitlines() if line.startswith("| AnyRes layout")]
    assert "no newlines, as VisionZip, VisPruner and HiPrune" in row
    assert "HiRED unpads without newlines" in row
    for name in ("visionzip", "vispruner", "hiprune", "hired"):
        said = " ".join(PRUNERS[name].__doc__.split())
        assert ("layout `mosaic`" in said) == (name != "hired"), name
    assert "no layout here is the same" in " ".join(PRUNERS["hired"].__doc__.split())
