"""The AnyRes merge against a brute-force model of LLaVA-NeXT's reading order."""

from __future__ import annotations

import pytest
import torch
from llava.mm_utils import get_anyres_image_grid_shape

from llava_hivtp.anyres import inside, merge_anyres
from llava_hivtp.model import unpadded
from llava_hivtp.vision import KeptTokens

N = 6  # patches per tile side
TILE = 84  # pixels per tile side
PINPOINTS = [[TILE * w, TILE * h] for w, h in [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]]
SIZES = [(640, 480), (480, 640), (336, 336), (1000, 300), (300, 1000), (77, 500), (2000, 10)]


def frame_of(size, columns, rows, unpad=True):
    return unpadded(N, (columns, rows), size) if unpad else (rows * N, columns * N)


def grid_of(size):
    return get_anyres_image_grid_shape(size, PINPOINTS, TILE)


def survivors(tiles, share, seed):
    rng = torch.Generator().manual_seed(seed)
    mask = torch.rand(tiles, N * N, generator=rng) < share
    tile, patch = mask.nonzero(as_tuple=True)
    tokens = torch.stack([tile, patch], 1).float()  # a token tells where it is from
    return KeptTokens(tokens, tile, patch)


def crop(rows, columns, size):
    """Rows and columns of the mosaic that LLaVA-NeXT keeps: [first, stop)."""
    high, wide = rows * N, columns * N
    if size[0] / size[1] > wide / high:
        pad = (high - int(size[1] * (wide / size[0]))) // 2
        return (pad, high - pad), (0, wide)
    pad = (wide - int(size[0] * (high / size[1]))) // 2
    return (0, high), (pad, wide - pad)


def brute_force(kept, columns, rows, size, unpad):
    """(tile, patch) of every token in reading order, None for a newline."""
    where = list(zip(kept.tile.tolist(), kept.patch.tolist(), strict=True))
    sequence = [place for place in where if place[0] == 0]
    (top, bottom), (left, right) = crop(rows, columns, size)
    if not unpad:
        top, bottom, left, right = 0, rows * N, 0, columns * N
    there = set(where)
    for y in range(top, bottom):
        row = []
        for x in range(left, right):
            place = (1 + y // N * columns + x // N, y % N * N + x % N)
            row += [place] if place in there else []
        sequence += row + ([None] if unpad and row else [])
    return sequence


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("share", [1.0, 0.5, 0.1, 0.01])
@pytest.mark.parametrize("unpad", [True, False])
def test_merge_equals_the_brute_force(size, share, unpad):
    columns, rows = grid_of(size)
    kept = survivors(1 + columns * rows, share, seed=columns)
    newline = torch.tensor([-1.0, -1.0]) if unpad else None
    frame = frame_of(size, columns, rows, unpad)
    image = merge_anyres(kept.tokens, kept, N, (columns, rows), frame, newline)
    expected = brute_force(kept, columns, rows, size, unpad)
    found = [None if t[0] < 0 else tuple(map(int, t)) for t in image.tokens.tolist()]
    assert found == expected
    assert image.newlines == expected.count(None)
    assert image.patches == len(expected) - image.newlines


@pytest.mark.parametrize("unpad", [True, False])
def test_total_is_what_an_unpruned_image_passes(unpad):
    kept = survivors(5, 1.0, seed=0)
    newline = torch.zeros(2) if unpad else None
    frame = frame_of((640, 480), 2, 2, unpad)
    everything = merge_anyres(kept.tokens, kept, N, (2, 2), frame, newline)
    some = survivors(5, 0.3, seed=0)
    pruned = merge_anyres(some.tokens, some, N, (2, 2), frame, newline)
    assert pruned.total == everything.total == everything.patches
    assert everything.total == (36 + 10 * 12 if unpad else 5 * 36)


def test_rows_without_a_survivor_lose_their_newline():
    tile, patch = torch.tensor([0, 1, 1]), torch.tensor([3, 0, 1])
    kept = KeptTokens(torch.tensor([[1.0], [2.0], [3.0]]), tile, patch)
    image = merge_anyres(kept.tokens, kept, N, (2, 2), (12, 12), torch.tensor([9.0]))
    assert image.tokens.flatten().tolist() == [1, 2, 3, 9]


def test_tokens_without_a_place_have_a_stated_one():
    tile = torch.tensor([0, 0, 1, 2, 1, 2])
    patch = torch.tensor([-1, 5, 7, 0, -1, -1])  # the base keeps its order, loose ones go last
    kept = KeptTokens(torch.arange(6.0)[:, None], tile, patch)
    image = merge_anyres(kept.tokens, kept, N, (2, 1), (6, 12), torch.tensor([9.0]))
    assert image.tokens.flatten().tolist() == [0, 1, 3, 9, 2, 9, 4, 5]
    assert (image.patches, image.newlines) == (6, 2)


def test_an_image_may_lose_every_token():
    kept = KeptTokens(torch.zeros(0, 2), torch.zeros(0).long(), torch.zeros(0).long())
    image = merge_anyres(kept.tokens, kept, N, (2, 2), (10, 12), torch.zeros(2))
    assert image.tokens.shape == (0, 2)
    assert (image.patches, image.newlines) == (0, 0)


@pytest.mark.parametrize("size", SIZES)
def test_inside_is_what_unpad_leaves(size):
    columns, rows = grid_of(size)
    every = survivors(1 + columns * rows, 1.0, seed=0)
    mask = inside(N, (columns, rows), frame_of(size, columns, rows))
    assert mask[0].all()
    left = [p for p in brute_force(every, columns, rows, size, True) if p and p[0]]
    assert sorted(left) == [tuple(p) for p in mask.nonzero().tolist() if p[0]]


def test_every_row_of_the_frame_may_end_with_a_newline():
    tile, patch = torch.tensor([0, 1, 1]), torch.tensor([3, 6, 7])  # the frame's first row
    kept = KeptTokens(torch.tensor([[1.0], [2.0], [3.0]]), tile, patch)
    image = merge_anyres(kept.tokens, kept, N, (2, 2), (10, 12), torch.tensor([9.0]), True)
    assert image.tokens.flatten().tolist() == [1, 2, 3, *[9] * 10]
    assert (image.patches, image.newlines) == (3, 10)
