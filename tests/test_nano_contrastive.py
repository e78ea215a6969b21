"""A tower taught by captions: what they say, and that matching them is learned."""

import random
import re

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from eval.nano.contrastive import Matcher, caption, contrastive_loss, draw_pairs
from eval.nano.draw import draw
from eval.nano.text import build_tokenizer, unknown_words
from eval.nano.tower import build_tower
from eval.nano.world import COLORS

torch.set_num_threads(1)


@pytest.mark.parametrize("kind", ["scene", "sign", "diagram"])
def test_a_caption_says_what_is_drawn_in_words_the_tokenizer_knows(kind):
    for seed in range(20):
        picture = draw(random.Random(seed), kind)
        text = caption(picture)
        assert not unknown_words(text)
        for thing in (*picture.shapes, *picture.boxes):
            assert re.search(rf"{thing.color} (box )?{thing.name}\b", text)
            assert thing.target is None or f"from {thing.name} to {thing.target}" in text
            assert thing.side is None or thing.side in text
        assert picture.sign is None or f'sign "{picture.sign}"' in text


def test_colours_and_places_can_be_left_out():
    picture = draw(random.Random(1), "diagram")
    bare = re.findall(r"[a-z]+", caption(picture, colored=False, placed=False))
    assert not {*COLORS, "at", "left", "right", "top", "bottom"} & set(bare)


def _texts(pairs):
    return build_tokenizer().batch_decode(pairs.captions, skip_special_tokens=True)


def test_a_step_draws_the_same_pairs_again():
    first, again, other = (draw_pairs(seed, 4, half=True) for seed in ("a", "a", "b"))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.shown, again.shown)
    assert _texts(first) == _texts(again) != _texts(other)
    assert draw_pairs("a", 4, half=False).shown is None


def test_kinds_of_pictures_are_mixed_only_while_it_is_easy():
    def kinds(pairs):
        return {"box" if "box" in t else "sign" if "sign" in t else "scene" for t in _texts(pairs)}

    assert all(len(kinds(draw_pairs(f"{i}", 8, half=True))) == 1 for i in range(6))
    assert len(kinds(draw_pairs("0", 24, half=True, easy=True))) == 3


def test_matching_is_learned():
    """Eight pairs are soon told apart, and their order does not matter."""
    torch.manual_seed(0)
    tower, matcher = build_tower(4), Matcher()
    pairs = draw_pairs("one batch", 8, half=True, easy=True)
    weights = [*tower.parameters(), *matcher.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=1e-3)
    losses = []
    for _ in range(25):
        loss, scores = contrastive_loss(tower, matcher, pairs)
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(weights, 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert scores["retrieved"] == 1
    assert matcher.scale.grad is not None
