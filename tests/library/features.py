"""Vision features made up from random numbers: no tower, no weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from llava_hivtp.vision import VisionFeatures

GRIDS = {1: (0, 0), 3: (2, 1), 4: (1, 3), 5: (2, 2)}  # tiles -> (columns, rows) of the sub-images
LAYERS = range(1, 25)


def random_features(
    tiles: int = 1,
    patches: int = 144,
    width: int = 16,
    heads: int = 2,
    layers: Iterable[int] = LAYERS,
    seed: int = 0,
) -> VisionFeatures:
    """Features of one image with Gaussian tokens, queries and keys and a linear projector."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    weight, half = draw(width, 2 * width), draw(width, 2 * width)
    shape = (tiles, heads, 1 + patches, width // heads)
    return VisionFeatures(
        tokens=draw(tiles, patches, width),
        cls=draw(tiles, width),
        queries={layer: draw(*shape) for layer in layers},
        keys={layer: draw(*shape) for layer in layers},
        project=lambda tokens: tokens @ weight.to(tokens.dtype),
        half_project=lambda tokens: tokens @ half.to(tokens.dtype),
        key=seed,
        tile_grid=GRIDS.get(tiles, (tiles - 1, 1)),
        question=draw(5, 2 * width),
    )


def with_attention(attention: dict[int, torch.Tensor], width: int = 16) -> VisionFeatures:
    """Features with given CLS attention, layer -> (T, N); it need not sum to 1.

    One head; every query is the same, so a patch receives from all what it receives from CLS.
    """
    tiles, patches = next(iter(attention.values())).shape
    features = random_features(tiles, patches, width, 1, ())
    query = torch.zeros(tiles, 1, 1 + patches, width)
    query[..., 0] = width**0.5
    keys = {}
    for layer, weights in attention.items():
        keys[layer] = torch.zeros_like(query)
        keys[layer][:, 0, 0, 0] = -50  # CLS itself receives nothing
        keys[layer][:, 0, 1:, 0] = weights.double().log().float()
    return replace(features, queries=dict.fromkeys(attention, query), keys=keys)


def tile_of(features: VisionFeatures, tile: int) -> VisionFeatures:
    """One tile as an image of its own."""
    part = slice(tile, tile + 1)
    return replace(
        features,
        tokens=features.tokens[part].clone(),
        cls=features.cls[part].clone(),
        queries={layer: q[part].clone() for layer, q in features.queries.items()},
        keys={layer: k[part].clone() for layer, k in features.keys.items()},
        tile_grid=(0, 0),
    )


def cast(features: VisionFeatures, dtype: torch.dtype) -> VisionFeatures:
    """The same features in another dtype."""
    return replace(
        features,
        tokens=features.tokens.to(dtype),
        cls=features.cls.to(dtype),
        queries={layer: q.to(dtype) for layer, q in features.queries.items()},
        keys={layer: k.to(dtype) for layer, k in features.keys.items()},
        question=features.question.to(dtype),
    )
