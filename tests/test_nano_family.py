"""The family of small models: trained, resumed and shipped."""

import pytest
import torch

from eval.nano.family import LAYERS, Lengths, train_member
from eval.nano.tower import Heads, build_projector, build_tower, draw_batch, tower_loss
from llava_hivtp import load

torch.set_num_threads(1)
TINY = Lengths(tower_steps=2, language_steps=1, album=10)


def test_a_member_trains_and_loads(tmp_path):
    model, *_ = load(train_member(tmp_path, "unguided", TINY))
    assert model.get_vision_tower().vision_tower.config.num_hidden_layers == LAYERS


def test_an_unknown_member_is_named():
    with pytest.raises(ValueError, match="name must be one of unguided, guided, got 'wild'"):
        train_member("nowhere", "wild")


def test_without_guide_no_gradient_comes_from_the_attention():
    """The loss of an unguided tower is that of a guided one less the guide's part."""
    torch.manual_seed(0)
    tower, projector, heads = build_tower(LAYERS), build_projector(), Heads()
    batch = draw_batch("a batch", 2, half=False)
    losses = [tower_loss(tower, projector, heads, batch, guide)[0] for guide in (0.0, 0.5, 1.0)]
    assert losses[0] < losses[1] < losses[2]
    torch.testing.assert_close(losses[2] - losses[1], losses[1] - losses[0], rtol=1e-3, atol=1e-3)
