"""Batches that fit by themselves: found from free memory, halved where it ends, nothing lost."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from pretend import Pretend, moved
from typer.testing import CliRunner

from eval.__main__ import app
from eval.efficiency import fit
from eval.efficiency.device import peak_bytes
from eval.efficiency.ideal import RequestSizes, request_bytes
from eval.results.agree import MixedResults, agreed
from eval.run import harness as official
from eval.untrained.shapes import shape_of

torch.set_num_threads(1)
HIVTP = {"pruner": "hivtp", "r": 2, "k": 25, "c": 2, "layers": "2+3"}


class Book:
    """A journal that only writes."""

    def __init__(self):
        self.written = []

    def get(self, instance):
        return None

    def add(self, finished):
        self.written += [instance.args[3] for instance, _ in finished]


@pytest.fixture(scope="module")
def asked(tiny, drawn):
    """A model, its requests and its answers one by one; tests leave it as they like."""
    from llava_hivtp.lmms import LlavaHIVTP

    lm = LlavaHIVTP(str(tiny()), **HIVTP, device_map="cpu")
    requests = official.requests(lm, official.load_task("pope", drawn), 12)
    for request in requests:
        request.args[1]["max_new_tokens"] = 2
    lm.batch_size = 1
    return lm, requests, [answer.text for answer in lm.generate_until(requests)]


@pytest.fixture
def there(asked, monkeypatch):
    """The model on the pretended device, in inference mode's stead without gradients."""
    from llava_hivtp import answer

    lm, requests, _ = asked
    answer_prepared = torch.no_grad()(answer.answer_prepared.__wrapped__)
    monkeypatch.setattr(answer, "answer_prepared", answer_prepared)
    monkeypatch.setattr(lm, "model", moved(lm.model))
    monkeypatch.setattr(lm, "journal", Book())
    lm.batch_size = 2
    with Pretend() as device:
        lm.generate_until(requests)
    lm.journal.written.clear()
    return lm, device.most


def test_out_of_memory_the_batch_is_halved_and_nothing_is_lost(asked, there, caplog):
    """On the pretended device, which has room for two requests."""
    (_, requests, expected), (lm, most) = asked, there
    lm.batch_size, lm.shrinks = 8, True
    with Pretend(largest=most), caplog.at_level(logging.WARNING, "llava_hivtp.lmms"):
        found = [answer.text for answer in lm.generate_until(requests)]
    assert found == expected
    assert sorted(lm.journal.written) == list(range(len(requests)))  # each of them once
    assert [record.message for record in caplog.records] == [
        "out of memory: going on with batch 4",
        "out of memory: going on with batch 2",
    ]
    assert lm.batch_size == 2  # for what comes next, too


def test_a_batch_that_was_asked_for_and_a_single_request_fail(asked, there):
    lm, most = there
    for batch, shrinks, room in ((8, False, most), (2, True, 8)):
        lm.batch_size, lm.shrinks = batch, shrinks
        with Pretend(largest=room), pytest.raises(torch.OutOfMemoryError):
            lm.generate_until(asked[1])


@pytest.mark.parametrize("batch", [1, 4])
def test_the_closed_form_holds_what_a_batch_takes(asked, batch):
    lm, requests, _ = asked
    shape = shape_of(lm.model)
    peak = peak_bytes(lambda: lm.answer([lm.read(r) for r in requests[:batch]]), lm.device)
    text = max(len(request.args[0]) for request in requests[:batch])  # a token a byte
    length = lm.model.kept[0].total + text + 200  # the conversation around it
    needed = request_bytes(shape, RequestSizes(batch, 1, 3, 16, length), 4, 2)
    assert peak < needed < 3 * peak


def test_the_batch_follows_the_free_memory(asked, monkeypatch):
    lm = asked[0]
    needed = request_bytes(*fit.largest_request(shape_of(lm.model)), 4, fit.GENERATED)
    for room, batch in ((0.5, 1), (1.1, 1), (2.1, 2), (15.9, 8), (1e9, fit.MOST)):
        monkeypatch.setattr(fit, "free_bytes", lambda _, room=room: room * needed / fit.SHARE)
        assert fit.fitting_batch(lm.model) == batch


def test_a_run_finds_its_batch_and_records_it(table, drawn, tmp_path, monkeypatch):
    config = table("pope", rows=("hivtp",))
    call = ["run", config, "--data", drawn, "--out", tmp_path, "--limit", 2, "--no-timing"]
    monkeypatch.setattr(fit, "fitting_batch", lambda model: 4)
    done = CliRunner().invoke(app, [*map(str, call), "--batch", "auto"])
    assert done.exit_code == 0, done.output
    (path,) = tmp_path.rglob("*.limit2.json")
    result = json.loads(path.read_text())
    assert result["protocol"]["batch size"] == "by memory"
    assert result["provenance"]["batch size"] == 4


def test_in_float32_alone_rows_of_different_batch_stand_in_one_table():
    def rows(dtype, *batches):
        protocols = ({"dtype": dtype, "batch size": batch, "task": {}} for batch in batches)
        return {str(i): {"pope": protocol} for i, protocol in enumerate(protocols)}

    found = agreed("stored", rows("float32", 16, 8, "by memory"))
    assert found["batch size"] == "8, 16, by memory"
    assert agreed("stored", rows("float16", "by memory", "by memory"))["batch size"] == "by memory"
    for mixed in ((16, 8), (16, "by memory")):
        with pytest.raises(MixedResults, match=r"batch size: 16 \(0\); (8|by memory) \(1\)"):
            agreed("stored", rows("float16", *mixed))
    odd = rows("float32", 16) | {"other": rows("float16", 8)["0"]}
    with pytest.raises(MixedResults, match=r"batch size(.*\n)*.*dtype"):
        agreed("stored", odd)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--batch", "0"], "--batch takes a number from 1 or auto, got '0'"),
        (["--batch", "many"], "--batch takes a number from 1 or auto, got 'many'"),
        (["--batch", "auto", "--zero3"], "with --zero3 give a number"),
    ],
)
def test_a_batch_that_cannot_be_is_refused(table, options, said):
    done = CliRunner().invoke(app, ["run", str(table()), *options])
    assert done.exit_code == 1
    assert said in done.stderr
