"""Received attention and CLS attention: the maps themselves are the oracle."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, CLIPVisionConfig

from llava_hivtp import importance
from llava_hivtp.importance import cls_attention, received_attention
from llava_hivtp.vision import VisionFeatures, encode_tiles

LAYERS = (2, 3, 5)


def random_features(tiles=2, heads=3, length=17, width=8, layers=(1,), seed=0, dtype=None):
    """Queries and keys laid out as the tap records them: a transposed view."""
    generator = torch.Generator().manual_seed(seed)

    def projected():
        flat = 2 * torch.randn(tiles, length, heads * width, generator=generator)
        return flat.to(dtype or torch.float32).unflatten(-1, (heads, -1)).transpose(1, 2)

    tokens = torch.zeros(tiles, length - 1, 4)
    queries = {layer: projected() for layer in layers}
    return VisionFeatures(tokens, tokens[:, 0], queries, {layer: projected() for layer in layers})


def literal_received(features, layers):
    """Equations 2-4 in float64, one map at a time."""
    total = 0
    for layer in layers:
        q, k = features.queries[layer].double(), features.keys[layer].double()
        total = total + (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1).mean((1, 2))
    return (total / len(layers))[:, 1:]


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_hidden_layers=6,
        image_size=56,
        patch_size=14,
    )
    tower = AutoModel.from_config(config, attn_implementation="eager").eval()
    for parameter in tower.parameters():  # peaked attention, so that the layers differ
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    return tower


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def tapped(clip, pixels):
    with torch.no_grad():
        hidden, tap = encode_tiles(clip, pixels, 6, LAYERS)
    return VisionFeatures(hidden[:, 1:], hidden[:, 0], tap.queries, tap.keys)


@pytest.fixture(scope="module")
def stock(clip, pixels):
    with torch.no_grad():
        return clip(pixels, output_attentions=True)


def test_received_attention_is_that_of_output_attentions(tapped, stock):
    maps = torch.stack([stock.attentions[layer - 1] for layer in LAYERS])  # (layers, T, H, 17, 17)
    expected = maps.double().mean((0, 2, 3))[:, 1:]
    torch.testing.assert_close(
        received_attention(tapped, LAYERS).double(), expected, rtol=1e-5, atol=1e-7
    )


def test_cls_attention_is_that_of_output_attentions(tapped, stock):
    expected = stock.attentions[4][:, :, 0, 1:].mean(1)
    torch.testing.assert_close(cls_attention(tapped, 5), expected, rtol=1e-5, atol=1e-7)


def test_tapping_leaves_the_tower_as_it_was(tapped, stock):
    hidden = torch.cat([tapped.cls[:, None], tapped.tokens], 1)
    assert torch.equal(hidden, stock.last_hidden_state)


@pytest.mark.parametrize("layers", [(1,), (1, 4), (4, 2, 1)])
def test_received_attention_is_the_literal_mean(layers):
    features = random_features(layers=(1, 2, 4))
    expected = literal_received(features, layers)
    torch.testing.assert_close(
        received_attention(features, layers).double(), expected, rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("maps_at_a_time", [1, 2, 1000])
def test_scores_do_not_depend_on_the_scratch_size(monkeypatch, maps_at_a_time):
    features = random_features(heads=5)
    expected = received_attention(features, (1,))
    monkeypatch.setattr(importance, "SCRATCH", maps_at_a_time * 4 * 17 * 17)
    torch.testing.assert_close(received_attention(features, (1,)), expected, rtol=1e-6, atol=1e-8)


def test_a_tile_scores_the_same_alone_to_the_bit():
    features = random_features(tiles=5)
    together = received_attention(features, (1,))
    for tile in range(5):
        part = slice(tile, tile + 1)
        alone = VisionFeatures(
            features.tokens[part],
            features.cls[part],
            {1: features.queries[1][part]},
            {1: features.keys[1][part]},
        )
        assert torch.equal(received_attention(alone, (1,)), together[part])


def test_attention_received_and_that_of_cls_add_up():
    features = random_features(tiles=3)
    q, k = features.queries[1], features.keys[1]
    maps = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    total = received_attention(features, (1,)).sum(1) + maps[..., 0].mean((1, 2))
    torch.testing.assert_close(total, torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_scored_in_float32(dtype):
    half = random_features(dtype=dtype)
    same = VisionFeatures(
        half.tokens, half.cls, {1: half.queries[1].float()}, {1: half.keys[1].float()}
    )
    for score in (received_attention(half, (1,)), cls_attention(half, 1)):
        assert score.dtype == torch.float32
    assert torch.equal(received_attention(half, (1,)), received_attention(same, (1,)))
    assert torch.equal(cls_attention(half, 1), cls_attention(same, 1))


def test_nan_shows_in_its_own_tile_only():
    features = random_features(tiles=3)
    features.keys[1][1, 0, 5, 0] = torch.nan
    scores = received_attention(features, (1,))
    assert torch.isnan(scores).any(1).tolist() == [False, True, False]


def test_a_layer_that_was_not_tapped_is_named():
    with pytest.raises(ValueError, match=r"layer 9 was not tapped, only \[1\]"):
        received_attention(random_features(), (9,))


class _LargestResult(TorchDispatchMode):
    """Bytes of the largest tensor any operation has made."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not function.is_view:
            self.bytes = max(self.bytes, result.numel() * result.element_size())
        return result


def test_scratch_is_flat_in_tiles():
    largest = {}
    for tiles in (1, 80):
        features = random_features(tiles=tiles, heads=4, length=65)
        with _LargestResult() as watch:
            received_attention(features, (1,))
        largest[tiles] = watch.bytes
    scores = 80 * 65 * 4
    assert scores <= largest[80] <= max(largest[1], scores)


def test_no_map_of_a_whole_layer_is_made():
    features = random_features(tiles=1, heads=16, length=577, width=4)
    with _LargestResult() as watch:
        received_attention(features, (1,))
    assert watch.bytes <= importance.SCRATCH < 16 * 577 * 577 * 4
