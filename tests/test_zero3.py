"""ZeRO-3: a model in shares answers like the whole one. The ranks are real, on a CPU over gloo.

Needs DeepSpeed: DS_BUILD_OPS=0 pip install -r third_party/requirements-zero3.txt
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from eval.benchmarks import data as datasets
from eval.benchmarks.records import BENCHMARKS
from eval.plan.table import load_table
from eval.results.shelf import Shelf

ROOT = Path(__file__).parent.parent
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
PATIENCE = 900  # seconds, for a crowded machine
COMPARED = ("unit", "score", "metrics", "requests", "tokens", "protocol")
METHODS = {"none": {}, "hivtp": {"r": 2, "k": 25, "c": 2, "layers": (2, 3)}}
# (size of the image, question, most tokens): a rank has every second one
ASKED = [
    ((60, 40), "Say", 3),
    ((40, 90), "What is it, then, my friend?", 12),
    ((100, 30), "Colour", 9),
    ((56, 56), "Name what you see in here", 4),
]
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)


def answers(model, tokenizer, asked):
    """What a model says under every method, and the image tokens it saw."""
    from llava_hivtp import build_pruner
    from llava_hivtp.answer import answer

    said = []
    for name, arguments in METHODS.items():
        model.pruner = build_pruner(name, **arguments)
        for size, question, most in asked:
            image = Image.new("RGB", size, (10 + size[0], 40, 200))
            reply = answer(model, tokenizer, image, question, max_new_tokens=most)
            said.append([reply.text, reply.generated, reply.patches, reply.newlines])
    return said


def held(module):
    """Bytes of a module's weights that lie in this process, those of its shares included."""
    weights = [*module.parameters(), *(w.ds_tensor for w in module.parameters() if is_shared(w))]
    return sum(weight.numel() * weight.element_size() for weight in weights)


def is_shared(weight):
    return hasattr(weight, "ds_tensor")


def rank(checkpoint, out):
    """What each process of the launcher does."""
    from llava_hivtp import load

    model, tokenizer, *_ = load(checkpoint, zero3=True)
    index = int(os.environ["RANK"])
    said = answers(model, tokenizer, ASKED[index::2])
    sizes = {"all": held(model), "layers": held(model.get_model().layers)}
    Path(out, f"{index}.json").write_text(json.dumps({"said": said, "bytes": sizes}))


def launch(*command, plugins=()):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *plugins))),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "1",
    }
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env=environment, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip


@needs_deepspeed
@pytest.mark.parametrize("anyres", [False, True])
def test_two_shares_answer_like_the_whole_model(tiny, tmp_path, anyres):
    """Each rank about images, questions and lengths of its own; half of each layer lies in it."""
    from llava_hivtp import load

    done = launch(*TORCHRUN, __file__, tiny(anyres), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    model, tokenizer, *_ = load(tiny(anyres), device_map="cpu")
    whole, layers = held(model), held(model.get_model().layers)
    for index in (0, 1):
        found = json.loads((tmp_path / f"{index}.json").read_text())
        assert found["said"] == answers(model, tokenizer, ASKED[index::2])
        # The row break of AnyRes is no weight any more but a buffer, whole as before.
        newline = model.get_model().image_newline.nbytes if anyres else 0
        assert found["bytes"] == {"layers": layers // 2, "all": whole - layers // 2 - newline}


def run(config, drawn, out, *options, zero3=True):
    ranks = TORCHRUN if zero3 else ()
    options = [*options, "--zero3"] if zero3 else [*options, "--no-timing"]
    return launch(*ranks, "-m", "eval", "run", config, "--data", drawn, "--out", out, *options)


def contents(config, out, limit):
    shelf = Shelf(load_table(config), out, limit=limit)
    assert all(shelf.state(unit).kind == "done" for unit in shelf.units)
    return [
        ([getattr(shelf.result(unit), key) for key in COMPARED], shelf.samples(unit))
        for unit in shelf.units
    ]


@needs_deepspeed
@pytest.mark.slow
def test_a_team_fills_the_table_that_one_process_fills(table, drawn, tmp_path):
    """Three batches for two ranks: the second answers one again, which counts once."""
    config, options = table("pope, ocrbench"), ("--limit", 6, "--batch", 2)
    done = run(config, drawn, tmp_path / "team", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = run(config, drawn, tmp_path / "alone", *options, zero3=False)
    assert alone.returncode == 0, alone.stderr[-3000:]
    assert contents(config, tmp_path / "team", 6) == contents(config, tmp_path / "alone", 6)
    assert not [*(tmp_path / "team").rglob("*.timing.json"), *tmp_path.rglob("*.journal.jsonl")]


@needs_deepspeed
@pytest.mark.slow
def test_a_rank_that_fails_ends_the_team_and_the_rerun_leaves_it_for_last(table, drawn, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(drawn, data)
    (file,) = datasets.files(data, BENCHMARKS["pope"].data[0])
    _break_an_image(file, 3)
    config = table("pope, ocrbench", rows=("full",))
    for state in ("missing", "done"):  # of the other unit
        done = run(config, data, out, "--limit", 4)
        assert done.returncode != 0
        assert "pope: document 3 cannot be read" in done.stderr
        shelf = Shelf(load_table(config), out, limit=4)
        assert [shelf.state(unit).kind for unit in shelf.units] == ["failed", state]


def _break_an_image(file, at):
    import pyarrow as pa
    from pyarrow import parquet

    rows = parquet.read_table(file)
    images = rows.column("image").to_pylist()
    images[at]["bytes"] = images[at]["bytes"][:200]
    column, kind = rows.schema.get_field_index("image"), rows.schema.field("image")
    parquet.write_table(rows.set_column(column, kind, pa.array(images, kind.type)), file)


@needs_deepspeed
@pytest.mark.slow
def test_lmms_eval_s_own_split_keeps_in_step(tiny, drawn, tmp_path, monkeypatch):
    """Its command line gives each rank its share of the documents, here 3 and 2."""
    subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    pruned = "pruner=hivtp,r=2,k=25,c=2,layers=2+3"
    found = {}
    monkeypatch.chdir(drawn)
    for name, ranks, more in (("one", (), "device_map=cpu"), ("two", TORCHRUN, "zero3=True")):
        done = launch(
            *ranks, "-m", "lmms_eval", "--model", "llava_hivtp", "--tasks", "pope",
            "--model_args", f"pretrained={tiny()},{pruned},{more}", "--limit", 5,
            "--output_path", tmp_path / name, "--log_samples", "--verbosity", "DEBUG",
            plugins=[tmp_path],
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        (samples,) = (tmp_path / name).rglob("*samples_pope.jsonl")
        records = [json.loads(line) for line in samples.read_text().splitlines()]
        found[name] = {record["doc_id"]: record["filtered_resps"] for record in records}
    assert found["one"] == found["two"]
    assert len(found["one"]) == 5


def test_without_deepspeed_the_error_says_what_to_install(tiny, monkeypatch):
    from llava_hivtp import load

    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ImportError, match=r"pip install 'llava_hivtp\[deepspeed\]'"):
        load(tiny(), zero3=True)


@needs_deepspeed
def test_without_a_launcher_the_error_names_it(tiny, monkeypatch):
    from llava_hivtp import load

    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="torchrun --nproc_per_node N"):
        load(tiny(), zero3=True)


@pytest.mark.parametrize("given", [{"device_map": "auto"}, {"quantization": "8bit"}])
def test_weights_are_placed_by_zero3_alone(tiny, given):
    from llava_hivtp import load

    with pytest.raises(ValueError, match="zero3 places the weights itself"):
        load(tiny(), zero3=True, **given)


if __name__ == "__main__":
    rank(*sys.argv[1:])
