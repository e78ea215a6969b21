"""The tap records what attention used and disturbs nothing."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava_hivtp.importance import cls_attention, received_attention
from llava_hivtp.vision import AttentionTap, VisionFeatures, encode_tiles, encoder_of

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}


@pytest.fixture(scope="module")
def tower():
    torch.manual_seed(0)
    model = CLIPVisionModel(CLIPVisionConfig(**SHAPE, attn_implementation="eager")).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def fast(tower):
    """The same weights under the attention that transformers would take by itself."""
    model = CLIPVisionModel(CLIPVisionConfig(**SHAPE)).eval()
    model.load_state_dict(tower.state_dict())
    return model


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(1))


def hooks(tower):
    return sum(len(module._forward_hooks) for module in tower.modules())


@torch.no_grad()
def test_tapped_attention_equals_the_maps(tower, pixels):
    full = tower(pixels, output_attentions=True, output_hidden_states=True)
    hidden, tap = encode_tiles(tower, pixels, 5, layers=(1, 4, 6))
    assert torch.equal(hidden, full.hidden_states[5])
    image = VisionFeatures(hidden[:, 1:], hidden[:, 0], tap.queries, tap.keys)
    for layer in (1, 4, 6):
        maps = full.attentions[layer - 1]  # (T, H, 1 + N, 1 + N)
        expected = maps.mean(2).mean(1)[:, 1:]
        torch.testing.assert_close(received_attention(image, (layer,)), expected)
        torch.testing.assert_close(cls_attention(image, layer), maps[:, :, 0, 1:].mean(1))


@torch.no_grad()
def test_the_default_attention_is_tapped_as_well(tower, fast, pixels):
    maps = tower(pixels, output_attentions=True).attentions
    hidden, tap = encode_tiles(fast, pixels, 5, layers=(4,))
    image = VisionFeatures(hidden[:, 1:], hidden[:, 0], tap.queries, tap.keys)
    expected = maps[3].mean((1, 2))[:, 1:]
    torch.testing.assert_close(received_attention(image, (4,)), expected)


@torch.no_grad()
def test_the_tap_leaves_outputs_and_modules_alone(tower, pixels):
    before, count = tower(pixels, output_hidden_states=True), hooks(tower)
    with AttentionTap(tower, (2, 3)) as tap:
        during = tower(pixels, output_hidden_states=True)
        assert hooks(tower) == count + 4
    assert hooks(tower) == count
    assert torch.equal(before.last_hidden_state, during.last_hidden_state)
    assert sorted(tap.queries) == sorted(tap.keys) == [2, 3]
    assert tap.keys[2].shape == (3, 4, 17, 8)


def test_hooks_and_layers_are_put_back_after_an_exception(tower):
    count, layers = hooks(tower), encoder_of(tower).layers
    with pytest.raises((ValueError, RuntimeError), match="size"):
        encode_tiles(tower, torch.zeros(1, 3, 70, 70), 5, layers=(2,))
    assert hooks(tower) == count
    assert encoder_of(tower).layers is layers


@pytest.mark.parametrize("layers", [(0,), (7,), (2, -1)])
def test_layers_count_from_one(tower, layers):
    with pytest.raises(ValueError, match=r"outside 1\.\.6"):
        AttentionTap(tower, layers)


def test_other_modules_are_refused():
    with pytest.raises(TypeError, match="CLIPVisionModel is needed, got Linear"):
        AttentionTap(torch.nn.Linear(2, 2), (1,))


def test_a_layer_that_was_not_tapped_is_named(tower, pixels):
    hidden, tap = encode_tiles(tower, pixels, 5, layers=(2,))
    image = VisionFeatures(hidden[:, 1:], hidden[:, 0], tap.queries, tap.keys)
    with pytest.raises(ValueError, match=r"layer 3 was not tapped, only \[2\]"):
        received_attention(image, (3,))
