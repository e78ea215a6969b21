"""The family of small models: trained, resumed and shipped."""

import pytest
import torch

from eval.nano.family import LAYERS, Lengths, train_member
from eval.nano.tower import Heads, build_projector, build_tower, draw_batch, tower_loss
from llava_hivtp import load

torch.set_num_threads(1)
TINY = Lengths(tower_steps=2, language_steps=1, album=10, caption_steps=1, projector_steps=1)


@pytest.mark.parametrize("name", ["unguided", "contrastive"])
def test_a_member_trains_and_loads(tmp_path, name):
    model, *_ = load(train_member(tmp_path, name, TINY))
    assert model.get_vision_tower().vision_tower.config.num_hidden_layers == LAYERS


def test_captions_teach_the_projector_only_with_the_language_model(tmp_path):
    """At first the language model is frozen; what was trained already is not trained again."""
    train_member(tmp_path, "contrastive", TINY)
    folder = tmp_path / "contrastive"
    states = {f.stem: (f.stat().st_mtime_ns, f.read_bytes()) for f in folder.glob("*.pt")}
    assert set(states) == {"tower", "projector", "language"}
    projector = torch.load(folder / "projector.pt", weights_only=True)["module"]
    assert {name.split(".")[0] for name in projector} == {"0", "2"}
    (folder / "language.pt").unlink()
    train_member(tmp_path, "contrastive", TINY)
    for name, file in ((n, folder / f"{n}.pt") for n in ("tower", "projector")):
        assert (file.stat().st_mtime_ns, file.read_bytes()) == states[name]


def test_an_unknown_member_is_named():
    with pytest.raises(ValueError, match="one of unguided, guided, contrastive, got 'wild'"):
        train_member("nowhere", "wild")


def test_without_guide_no_gradient_comes_from_the_attention():
    """The loss of an unguided tower is that of a guided one less the guide's part."""
    torch.manual_seed(0)
    tower, projector, heads = build_tower(LAYERS), build_projector(), Heads()
    batch = draw_batch("a batch", 2, half=False)
    losses = [tower_loss(tower, projector, heads, batch, guide)[0] for guide in (0.0, 0.5, 1.0)]
    assert losses[0] < losses[1] < losses[2]
    torch.testing.assert_close(losses[2] - losses[1], losses[1] - losses[0], rtol=1e-3, atol=1e-3)
