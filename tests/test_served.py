"""`--engine vllm`: what is refused, what an engine that dies costs, and equal answers.

Fast tests speak to a stand-in for `vllm serve`, which generates nothing but the end mark; slow ones
to vLLM itself, where `make setup-vllm` has put it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from eval.__main__ import app
from eval.nano import CHECKPOINTS
from eval.nano.served import EAGER, flips
from eval.plan.table import load_table
from eval.plan.tower import read_tower
from eval.results.shelf import Shelf
from eval.run.engine import Engine, EngineError, EngineNotStarted, Server
from eval.run.served import PARTS
from llava_hivtp.convert import to_transformers

ROOT = Path(__file__).parents[1]
VLLM = ROOT / ".venv-vllm"
ROWS = {
    "full": "pruner: none, block: 100",
    "hivtp": "pruner: hivtp, r: 2, k: 25, c: 2, fill: true, layers: [4, 5], block: 50",
    "varies": "pruner: hivtp, r: 2, k: 25, c: 2, layers: [4, 5], block: 50",
    "asks": "pruner: cdpruner, keep: 0.5, block: 50",
}

# GET /health; a generate request: one token, the end mark, behind the prompt with KEPT tokens for
# its placeholder; a render request: the pixels that lie in PIXELS. Request DIES ends it.
STAND_IN = """#!{python}
import base64, http.server, json, os, sys
KEPT, DIES, MARK = (int(os.environ[name]) for name in ("KEPT", "DIES", "MARK"))
asked = open(os.environ["ASKED"], "a")
class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def do_GET(self): self.reply({{}})
    def reply(self, body):
        data = json.dumps(body).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(data)))
        self.end_headers(); self.wfile.write(data)
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path.endswith("render"):
            with open(os.environ["PIXELS"], "rb") as pixels:
                encoded = base64.b64encode(b"head" + pixels.read() + b"tail").decode()
            return self.reply({{"features": {{"kwargs_data": {{"image": [encoded]}}}}}})
        asked.write("x"); asked.flush()
        if os.stat(asked.name).st_size == DIES:
            print("ValueError: out of memory", flush=True)
            os._exit(7)
        ids = body["token_ids"]
        ids = [t for i in ids for t in ([MARK] * KEPT if i == MARK else [i])]
        self.reply({{"prompt_token_ids": ids, "choices": [{{"token_ids": [2]}}]}})
if "--dies-at-start" in sys.argv:
    sys.exit("ValueError: no memory left")
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The embedded model in transformers' format."""
    return to_transformers(CHECKPOINTS / "nodrop", tmp_path_factory.mktemp("hf") / "nodrop")


@pytest.fixture
def config(tmp_path, converted):
    """Writes a table of these rows; returns its path."""

    def write(*rows, model=converted):
        lines = "".join(f"\n  - {{id: {row}, {ROWS[row]}}}" for row in rows)
        path = tmp_path / "table.yaml"
        path.write_text(
            f"title: tiny\nmodels: ['{model}']\nlayout: unpad\npatches: 144\n"
            f"tasks: [pope]\nprotocol: {{pope: accuracy}}\nrows:{lines}\n"
        )
        return path

    return write


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Folder of an environment whose vLLM is the stand-in; returns it and the count of requests."""
    folder, asked = tmp_path / "engine", tmp_path / "asked"
    (folder / "bin").mkdir(parents=True)
    for name, text in (
        ("vllm", STAND_IN.format(python=sys.executable)),
        ("python", "#!/bin/sh\necho 9.9\n"),
    ):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    asked.touch()
    for name, value in {"KEPT": "72", "DIES": "0", "MARK": "174"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ASKED", str(asked))
    monkeypatch.setenv("PIXELS", str(tmp_path / "pixels"))
    return folder, lambda: asked.stat().st_size


def call(config, drawn, out, *options):
    given = [config, "--data", drawn, "--out", out, "--limit", 8, "--no-timing", *options]
    return CliRunner().invoke(app, ["run", *map(str, given)])


def test_a_checkpoint_of_transformers_has_a_tower(converted):
    assert read_tower(str(converted)) == read_tower(str(CHECKPOINTS / "nodrop"))


def test_what_cannot_be_served_is_refused_by_name_before_anything_starts(
    config, drawn, tmp_path, monkeypatch
):
    monkeypatch.setattr("eval.run.job.Job._load", lambda self: pytest.fail("something starts"))
    path, out = config("full", "varies", "asks"), tmp_path / "out"
    engine = ("--engine", "vllm", "--engine-env", tmp_path / "none")
    done = call(path, drawn, out, *engine, "--model-args", "quantization=8bit")
    said = " ".join(done.stderr.split())
    assert done.exit_code == 1
    assert f"no vLLM in {tmp_path / 'none'}: `make setup-vllm`" in said
    assert "quantization is of the model in this process" in said
    assert f"{path}:9: row 'varies' cannot be served: hivtp with fill=False" in said
    assert f"{path}:10: row 'asks' cannot be served: cdpruner chooses by the question" in said
    assert "row 'full'" not in said
    official = call(config("full", model=CHECKPOINTS / "nodrop"), drawn, out, *engine)
    assert "nodrop is LlavaLlamaForCausalLM: name such a checkpoint with --model" in official.stderr
    unknown = call(path, drawn, out, "--engine", "sglang")
    assert "--engine takes vllm, got 'sglang'" in unknown.stderr


def test_an_engine_that_does_not_start_ends_the_run_with_its_words(
    config, drawn, tmp_path, stand_in
):
    engine = ("--engine", "vllm", "--engine-env", stand_in[0], "--engine-args=--dies-at-start")
    done = call(config("full", "hivtp"), drawn, tmp_path / "out", *engine)
    assert done.exit_code == 1
    assert "error: vLLM ended with status 1; its log says: ValueError: no memory" in done.stderr


def pixels_of(converted, image, path):
    """Write the pixels that this environment makes of an image."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(converted, backend="pil")
    made = processor.image_processor(image, return_tensors="pt")["pixel_values"]
    path.write_bytes(made.numpy().tobytes())


@pytest.fixture
def same_pixels(monkeypatch):
    """Take the stand-in's pixels for equal: it has one file of them for all images."""
    monkeypatch.setattr("eval.run.served.CHECKED", 1)
    monkeypatch.setattr("eval.run.served.Served._check_pixels", lambda *_: None)


def test_a_dead_engine_is_named_and_the_rerun_asks_for_what_is_left(
    config, drawn, tmp_path, stand_in, same_pixels, monkeypatch, caplog
):
    folder, asked = stand_in
    path, out = config("hivtp"), tmp_path / "out"
    engine = ("--engine", "vllm", "--engine-env", folder)
    monkeypatch.setenv("DIES", "4")
    assert call(path, drawn, out, *engine).exit_code == 1
    assert "EngineError: vLLM ended with status 7; its log says: ValueError: out of" in caplog.text
    shelf = Shelf(load_table(path), out, limit=8)
    (unit,) = shelf.units
    assert shelf.state(unit).kind == "failed"
    assert asked() == 4
    monkeypatch.setenv("DIES", "0")
    done = call(path, drawn, out, *engine)
    assert done.exit_code == 0, done.output
    assert asked() in (9, 10)  # the one that died with the engine, or one begun beside it, again
    shelf = Shelf(load_table(path), out, limit=8)
    result, samples = shelf.result(unit), shelf.samples(unit)
    assert (result.tokens.patches, result.tokens.total, result.requests) == (72, 144, 8)
    assert result.protocol["engine"] == "vLLM 9.9"
    assert {sample.generated for sample in samples} == {1}
    assert {"eval.run.served", "eval.run.engine", *PARTS} <= result.source.keys()
    assert shelf.state(unit).kind == "done"
    mixed = call(config("hivtp", "full"), drawn, out)
    assert mixed.exit_code == 1
    assert "engine: vLLM 9.9 (hivtp); not recorded (this run)" in mixed.stderr


def test_an_engine_that_keeps_another_number_of_tokens_fails_the_unit(
    config, drawn, tmp_path, stand_in, same_pixels, monkeypatch, caplog
):
    monkeypatch.setenv("KEPT", "71")
    engine = ("--engine", "vllm", "--engine-env", stand_in[0])
    assert call(config("hivtp"), drawn, tmp_path / "out", *engine).exit_code == 1
    assert "vLLM takes 71 tokens for the images of" in caplog.text
    assert "HIVTP leaves 72" in caplog.text


@pytest.fixture
def served(converted, stand_in):
    from eval.run.served import Served

    made = Served(str(converted), Engine(stand_in[0]))
    made.hivtp = {"pruner": "hivtp"}
    yield made
    made.close()


def test_a_prompt_is_the_one_in_process_but_for_repeated_placeholders(served):
    from llava_hivtp.answer import Request, prepare_batch

    album = tuple(Image.new("RGB", (40 + i, 70), "red") for i in range(2))
    for images, question in ((album, "<image> or <image>?"), (album[:1], "Red?"), ((), "Hello")):
        request = Request(question, {}, images)
        batch = prepare_batch(served.model, served.tokenizer, [request], "")
        prompt = served._prompt(request)
        mark = served.model.config.image_token_id
        ids = [t for i in prompt.ids for t in ([mark] * 144 if i == mark else [i])]
        assert ids == batch.given["inputs"][0].tolist()
        assert prompt.ids.count(mark) == len(images)
        assert prompt.total == 144 * len(images)


def test_other_pixels_are_refused_with_the_version_to_install(served, converted, tmp_path):
    from llava_hivtp.answer import Request

    image = Image.effect_mandelbrot((97, 61), (-3, -2.5, 2, 2.5), 100).convert("RGB")
    server = served._start()
    request = Request("What is it?", {"max_new_tokens": 4}, (image,))
    pixels_of(converted, image, tmp_path / "pixels")
    served._check_pixels(server, served._prompt(request), ["data:"])
    pixels_of(converted, image.rotate(1), tmp_path / "pixels")
    with pytest.raises(ValueError, match="vLLM makes other pixels of an image .* Pillow is 1"):
        served._check_pixels(server, served._prompt(request), ["data:"])


def test_what_is_not_greedy_is_refused(served):
    with pytest.raises(ValueError, match="decodes greedily here, the task asks for .*num_beams"):
        served._sampling({"max_new_tokens": 4, "num_beams": 3, "do_sample": False}, [])
    bias = served._sampling({"max_new_tokens": 4, "num_beams": 1, "do_sample": False}, [])
    assert bias["logit_bias"] == {"174": -100}  # the placeholder, which `generate` suppresses


def test_a_server_ends_with_whoever_started_it(stand_in):
    server = Server(Engine(stand_in[0]), "model", [])
    assert not server.ended
    server.close()
    assert server.ended
    with pytest.raises(EngineNotStarted, match="no memory left"):
        Server(Engine(stand_in[0], ("--dies-at-start",)), "model", [])
    assert issubclass(EngineNotStarted, EngineError)


def start(config, drawn, out, *options):
    """The command in a process of its own, its output to a pipe."""
    call = [sys.executable, "-m", "eval", "run", config, "--data", drawn, "--out", out]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return subprocess.Popen(
        [*map(str, call), "--limit", "40", "--no-timing", *options],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def engine_of(process):
    """Process id of the `vllm serve` that a run has started, if it has."""
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
            if (
                int(fields["PPid"]) == process.pid
                and "vllm" in status.with_name("cmdline").read_text()
            ):
                return int(fields["Pid"])
    return None


@pytest.mark.slow
@pytest.mark.skipif(not (VLLM / "bin/vllm").is_file(), reason="needs vLLM: make setup-vllm")
def test_vllm_killed_in_a_unit_is_named_and_answers_equal_those_in_process(config, drawn, tmp_path):
    path, engine = config("full", "hivtp"), ("--engine", "vllm", "--engine-args", EAGER)
    served, alone = tmp_path / "vllm", tmp_path / "alone"
    run = start(path, drawn, served, *engine, "--batch", "2")
    journals = []
    while not journals or journals[0].read_bytes().count(b"\n") < 3:
        assert run.poll() is None, run.stderr.read()
        journals = [*served.rglob("*.journal.jsonl")]
        time.sleep(0.01)
    os.kill(engine_of(run), signal.SIGKILL)
    said = run.communicate()[1]
    assert run.returncode == 1
    assert "full pope: failed: EngineError: vLLM ended with status -9" in said
    assert "hivtp pope: score" in said  # a new engine answers the next row
    assert journals[0].read_bytes().count(b"\n") >= 3
    for out, options in ((served, (*engine, "--batch", "16")), (alone, ())):
        run = start(path, drawn, out, *options)
        assert "failed" not in run.communicate()[1]
        assert run.returncode == 0
    ours, theirs = (Shelf(load_table(path), out, limit=40) for out in (alone, served))
    for unit, other in zip(ours.units, theirs.units, strict=True):
        assert flips(ours.samples(unit), theirs.samples(other)) == 0
        assert theirs.samples(other) == ours.samples(unit)
        assert theirs.result(other).score == ours.result(unit).score
    full, hivtp = (theirs.result(unit).tokens for unit in theirs.units)
    assert (full.patches, hivtp.patches) == (144, 72)
