"""The tap records what attention used and disturbs nothing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava_hivtp.importance import cls_attention, received_attention
from llava_hivtp.vision import AttentionTap, VisionFeatures, encode_tiles

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
def test_the_tap_leaves_the_tower_alone(tower, pixels):
    before, state = tower(pixels, output_hidden_states=True), snapshot(tower)
    for depth in (5, 6):
        hidden, tap = encode_tiles(tower, pixels, depth, layers=(2, 3, 6))
        assert torch.equal(hidden, before.hidden_states[depth])
        assert sorted(tap.queries) == sorted(tap.keys) == [2, 3, 6]
        assert tap.keys[2].shape == (3, 4, 17, 8)
    with pytest.raises((ValueError, RuntimeError), match="size"):
        encode_tiles(tower, torch.zeros(1, 3, 70, 70), 5, layers=(2,))
    assert snapshot(tower) == state
    assert torch.equal(before.last_hidden_state, tower(pixels).last_hidden_state)


def snapshot(tower):
    """Everything that a call could have changed in the tower's modules."""
    return {
        name: (
            type(module),
            len(module._forward_hooks),
            tuple(module._modules.values()),
            "forward" in vars(module),
        )
        for name, module in tower.named_modules()
    }


@torch.no_grad()
def test_taps_of_several_threads_do_not_see_each_other(tower, pixels):
    tapped = {
        (layer,): encode_tiles(tower, pixels[:1] * layer, 5, (layer,)) for layer in range(1, 7)
    }

    @torch.no_grad()
    def again(layers):
        for _ in range(20):
            hidden, tap = encode_tiles(tower, pixels[:1] * layers[0], 5, layers)
            assert torch.equal(hidden, tapped[layers][0])
            assert list(tap.queries) == list(layers)
            assert torch.equal(tap.queries[layers[0]], tapped[layers][1].queries[layers[0]])

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(again, tapped))


@torch.no_grad()
def test_a_forward_that_accelerate_replaced_is_tapped_as_well(tower, pixels):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    hidden, tap = encode_tiles(tower, pixels, 5, layers=(3,))
    for module in tower.modules():
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    try:
        again, same = encode_tiles(tower, pixels, 5, layers=(3,))
    finally:
        for module in tower.modules():
            remove_hook_from_module(module)
    assert torch.equal(hidden, again)
    assert torch.equal(tap.keys[3], same.keys[3])


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
