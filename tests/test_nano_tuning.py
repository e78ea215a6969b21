"""The embedded model's own data for LLaVA's trainer, and the whole tuning in small."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from eval.nano import tuning
from eval.nano.text import unknown_words
from eval.nano.world import TEST_WORDS

TRAINER = Path(__file__).parent.parent / ".venv-4.37.2" / "bin" / "python"


@pytest.fixture(scope="module")
def drawn_samples(tmp_path_factory):
    out = tmp_path_factory.mktemp("conversations")
    return out, json.loads(tuning.conversations(out, 30).read_text())


def test_samples_are_conversations_about_pictures(drawn_samples):
    out, samples = drawn_samples
    assert 30 < len(samples) <= 30 * tuning.QUESTIONS
    assert len({sample["id"] for sample in samples}) == len(samples)
    for sample in samples:
        question, answer = sample["conversations"]
        assert (question["from"], answer["from"]) == ("human", "gpt")
        assert question["value"].startswith("<image>\n")
        assert not unknown_words(f"{question['value'][8:]} {answer['value']}")
        assert Image.open(out / sample["image"]).size == (144, 144)


def test_what_is_asked_in_the_end_is_not_trained_on(drawn_samples):
    words = {
        word for s in drawn_samples[1] for t in s["conversations"] for word in t["value"].split()
    }
    assert not words & set(TEST_WORDS)


def test_samples_are_drawn_once_and_the_same_everywhere(drawn_samples, tmp_path):
    out, samples = drawn_samples
    again = tuning.conversations(tmp_path, 30)
    assert json.loads(again.read_text()) == samples
    assert (tmp_path / "7.png").read_bytes() == (out / "7.png").read_bytes()
    again.write_text("[]")
    assert tuning.conversations(tmp_path, 30).read_text() == "[]"


@pytest.mark.slow
@pytest.mark.skipif(not TRAINER.is_file(), reason="needs make setup TRANSFORMERS=4.37.2")
def test_tuning_runs_reports_and_is_not_done_twice(tmp_path, monkeypatch):
    small = tuning.Tuning(tmp_path, TRAINER, pictures=20)
    said = tuning.run_tuning(small)
    for how in tuning.HOW:
        for row in ("hivtp-25", "hivtp-11"):
            assert re.search(rf"\| {how}, {row} +\| {row} +\|.*± .* points", said)
            assert re.search(rf"\| {how}, {row} +\| full +\|.*± .* points", said)
    monkeypatch.setattr(tuning, "_python", lambda *_: None)  # nothing is left to run
    assert tuning.run_tuning(small) == said
