"""The embedded model: what is shipped, and that training makes it."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from eval.nano import CHECKPOINTS, EMBEDDED, fit
from eval.nano.checkpoint import digest
from eval.nano.draw import LARGE, draw
from eval.nano.language import draw_kind, make_album, pack, predict, questions_about, show_all
from eval.nano.tower import (
    LAYERS,
    build_tower,
    draw_batch,
    find_things,
    middle,
    pixels,
    received,
    run_tower,
)
from eval.nano.train import Sizes, train, train_language, train_tower
from llava_hivtp import build_pruner, load
from llava_hivtp.images import prepare_images
from llava_hivtp.importance import received_attention
from llava_hivtp.pruners import for_depth
from llava_hivtp.vision import VisionFeatures, encode_tiles

ROOT = Path(__file__).parents[1]
SHIPPED = json.loads((CHECKPOINTS / "digests.json").read_text())
TINY = Sizes(
    tower_steps=4, language_steps=4, nodrop_steps=4, album=20, anyres_steps=2, anyres_album=10
)

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of a run that trained everything a few steps."""
    out = tmp_path_factory.mktemp("trained")
    train(out, "anyres", TINY)
    return out


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights_are_those_that_were_measured(name):
    assert digest(CHECKPOINTS / name) == SHIPPED[name]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_checkpoint_is_small(name):
    assert sum(f.stat().st_size for f in (CHECKPOINTS / name).rglob("*")) <= 8 * 2**20


def test_every_shipped_folder_has_a_digest():
    assert {path.name for path in CHECKPOINTS.iterdir() if path.is_dir()} == {*SHIPPED}


@pytest.mark.parametrize("pruner", ["none", "hivtp"])
def test_the_embedded_model_answers_well_above_chance(pruner):
    """Questions of one word about fresh pictures, asked as its data sets ask."""
    from llava.mm_utils import tokenizer_image_token

    from eval.nano.questions import color_of
    from eval.nano.text import SHORT
    from llava_hivtp.conversation import build_prompt

    method = for_depth(build_pruner(pruner), 12)
    model, tokenizer, processor, _ = load(EMBEDDED, method)
    rng, hits = random.Random(77), []
    while len(hits) < 20:
        picture = draw(rng, "scene")
        question = color_of(rng, picture)
        if not question:
            continue
        images, sizes = prepare_images([picture.image], processor, model.config)
        prompt = build_prompt("vicuna_v1", f"{question.text}\n{SHORT}", 1)
        ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")[None]
        output = model.generate(ids, images=images, image_sizes=sizes, max_new_tokens=4)
        hits.append(tokenizer.decode(output[0], skip_special_tokens=True) == question.answer)
    assert sum(hits) >= 14  # one colour of eight by chance


@pytest.mark.parametrize("canvas", [(), *LARGE])
def test_the_checkpoint_computes_what_training_computed(trained, canvas):
    """Prompt, tiles, row breaks and weights: official LLaVA gives the logits of the packed rows."""
    from llava.mm_utils import tokenizer_image_token

    parts = train_tower(trained / "tower", TINY.tower_steps)
    model, tokenizer, processor, _ = load(trained / "anyres" / "checkpoint")
    if not canvas:
        checkpoint = train(trained, "v15", TINY)
        model, tokenizer, processor, _ = load(checkpoint)
    learned = _learned(trained, parts, "anyres" if canvas else "v15")
    album = make_album(parts, "seed", 1, canvas)
    encoded, _ = questions_about(album, [0], random.Random(0), hints=False)
    encoded = [[encoded[0][0]]]
    with torch.no_grad():
        ours = predict(learned, show_all(album, [0]), pack(encoded))[0]
    _, picture = draw_kind(random.Random("seed"), canvas)
    images, sizes = prepare_images([picture.image], processor, model.config)
    start, _ = encoded[0][0].answer
    text = tokenizer.decode(encoded[0][0].ids[: start + 1])
    ids = tokenizer_image_token(f"{_before()}<image>{text}", tokenizer, return_tensors="pt")[None]
    with torch.no_grad():
        theirs = model(ids, images=images, image_sizes=sizes).logits[0, -1]
    # Half-precision weights and bfloat16 features on our side.
    torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0.05)


def _before():
    from eval.nano.text import SYSTEM

    return f"{SYSTEM} USER: "


def _learned(out, parts, variant):
    from eval.nano.language import Newline, build_language
    from eval.nano.tower import build_projector

    learned = torch.nn.ModuleDict({"language": build_language(), "projector": build_projector()})
    if variant == "anyres":
        learned["newline"] = Newline()
    stage = "anyres" if variant == "anyres" else "language"
    assert fit.restore(out / variant, stage, learned, 1)
    return learned.eval()


def test_pixels_are_those_of_the_image_processor(trained):
    model, _, processor, _ = load(trained / "anyres" / "checkpoint")
    picture = draw(random.Random(1), "scene")
    model.config.image_aspect_ratio = "square"
    images, _ = prepare_images([picture.image], processor, model.config)
    torch.testing.assert_close(images, pixels([picture.image]), atol=1e-6, rtol=0)


def test_training_guides_the_attention_that_hivtp_scores():
    tower = build_tower().eval()
    images = pixels([draw(random.Random(i), "scene").image for i in range(3)])
    with torch.no_grad():
        ours = received(tower, run_tower(tower, images)[2])
        hidden, tap = encode_tiles(tower, images, LAYERS - 1, middle(tower))
    features = VisionFeatures(hidden[:, 1:], hidden[:, 0], tap.queries, tap.keys)
    torch.testing.assert_close(ours, received_attention(features, middle(tower)))


@pytest.mark.parametrize("name", ["v15", "nodrop"])
def test_the_middle_layers_of_the_shipped_tower_find_what_is_drawn(name):
    """Their 36 most attended patches of 144 hold most of those with a thing on them."""
    model, *_ = load(CHECKPOINTS / name)
    tower = model.get_vision_tower().vision_tower
    batch = draw_batch("fresh pictures", 20, half=False)
    with torch.no_grad():
        hidden, tap = encode_tiles(tower, batch.images, LAYERS - 1, middle(tower))
    features = VisionFeatures(hidden[:, 1:], hidden[:, 0], tap.queries, tap.keys)
    best = received_attention(features, middle(tower)).topk(36, 1).indices
    things = find_things(batch.aspects)
    found = things.gather(1, best).sum(1) / things.sum(1).clamp(max=36)
    assert found.mean() > 0.8  # 0.25 by chance


def test_training_lowers_the_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "_LOG_EVERY", 5)
    parts = train_tower(tmp_path, 20)
    train_language(tmp_path, parts, True, 20, 40)
    for stage in ("tower", "language"):
        lines = (tmp_path / f"{stage}.jsonl").read_text().splitlines()
        first, *_, last = (json.loads(line)["loss"] for line in lines)
        assert last < 0.95 * first


KILLED = """
import sys
from pathlib import Path
import torch
from eval.nano import fit
from eval.nano.train import train_tower
torch.set_num_threads(1)
fit._SAVE_EVERY = 2
train_tower(Path(sys.argv[1]), 6)
"""


def test_a_killed_training_goes_on_to_the_same_bits(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [sys.executable, "-c", KILLED]
    process = subprocess.Popen([*command, str(killed)], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (killed / "tower.pt").is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = torch.load(killed / "tower.pt", weights_only=True)["step"]
    assert reached < 6, "killed too late to test anything"
    for folder in (killed, whole):
        subprocess.run([*command, str(folder)], cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    states = [torch.load(f / "tower.pt", weights_only=True)["module"] for f in (whole, killed)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_an_unknown_variant_is_refused(tmp_path):
    with pytest.raises(ValueError, match="v15, anyres, nodrop"):
        train(tmp_path, "v16")
