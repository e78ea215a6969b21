"""HIVTP against a literal loop over Algorithms 1 and 2, and the counts of the paper."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_hivtp import build_pruner
from llava_hivtp.importance import received_attention
from llava_hivtp.pruners import HIVTP
from llava_hivtp.vision import VisionFeatures

# (r, k, c) -> tokens per region, p_max, least p: every setting of the paper's Tables 1-3
SETTINGS = {
    (2, 50, 2): (72, 432, 360),
    (2, 25, 2): (36, 288, 252),
    (2, 15, 2): (21, 228, 208),
    (2, 14, 3): (20, 144, 136),
    (1, 25, 2): (144, 288, 252),
    (3, 25, 2): (16, 288, 252),
    (2, 39, 3): (56, 288, 264),
    (2, 50, None): (72, 288, 288),
}


def literal(scores, n, r, k, c):
    """Algorithm 2 on a list of scores, index by index; ties go to the lowest index."""
    side, kept_global = n // r, set()
    for region in range(r * r):
        top, left = region // r * side, region % r * side
        inside = [(top + y) * n + left + x for y in range(side) for x in range(side)]
        inside.sort(key=lambda t: (-scores[t], t))
        kept_global |= set(inside[: (k * side * side) // 100])
    kept_local = set()
    for y in range(0, n, c or n):
        for x in range(0, n, c or n):
            if c is None:
                continue
            window = [(y + dy) * n + x + dx for dy in range(c) for dx in range(c)]
            rest = [t for t in window if t not in kept_global]
            if rest:
                kept_local.add(min(rest, key=lambda t: (-scores[t], t)))
    return kept_global, kept_local


def fields(n, seed):
    """Score maps (T, n * n) of several kinds: noise, clumps, plateaus, ramps, constants."""
    rng = torch.Generator().manual_seed(seed)
    noise = torch.rand(n * n, generator=rng)
    small = torch.rand(1, 1, 4, 4, generator=rng)
    clumps = torch.nn.functional.interpolate(small, size=(n, n), mode="bicubic").flatten()
    plateaus = (noise * 4).floor()
    ramp = -torch.arange(n * n, dtype=torch.float32)
    return torch.stack([noise, clumps, plateaus, ramp, -ramp, torch.ones(n * n)])


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("n", [12, 24])
def test_stages_equal_the_literal_algorithm(setting, n):
    r, k, c = setting
    pruner = HIVTP(r=r, k=k, c=c)
    scores = torch.cat([fields(n, seed) for seed in range(3)])
    for row, stages in zip(scores.tolist(), pruner.stages(scores), strict=True):
        kept_global, kept_local = literal(row, n, r, k, c)
        assert set((stages == 1).nonzero().flatten().tolist()) == kept_global
        assert set((stages == 2).nonzero().flatten().tolist()) == kept_local


@pytest.mark.parametrize(("setting", "counts"), SETTINGS.items())
def test_counts_are_the_papers(setting, counts):
    r, k, c = setting
    per_region, p_max, p_least = counts
    pruner = HIVTP(r=r, k=k, c=c)
    assert pruner.budget(1, 576) == p_max
    assert pruner.budget(5, 576) == 5 * p_max
    stages = pruner.stages(fields(24, 0))
    side = 24 // r
    regions = (stages == 1).view(-1, r, side, r, side).sum((2, 4))
    assert (regions == per_region).all()
    kept = (stages > 0).sum(1)
    assert ((kept >= p_least) & (kept <= p_max)).all()


def test_constant_scores_keep_the_lowest_indices():
    stages = HIVTP(r=2, k=25, c=2).stages(torch.ones(1, 576)).view(24, 24)
    assert (stages[:3] == 1).all()  # the first three rows of the upper regions
    assert (stages[12:15] == 1).all()
    assert (stages > 0).sum() == 264  # 24 windows are kept whole: 144 + 144 - 24


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    n=st.sampled_from([6, 12, 24]),
    k=st.one_of(st.integers(1, 100), st.floats(0.5, 100)),
    tiles=st.integers(1, 3),
)
def test_invariants(data, n, k, tiles):
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    r, c = data.draw(st.sampled_from(divisors)), data.draw(st.sampled_from(divisors))
    levels = data.draw(st.sampled_from([2, 10, 10**6]))
    seed = data.draw(st.integers(0, 10**6))
    scores = torch.randint(levels, (tiles, n * n), generator=torch.Generator().manual_seed(seed))
    scores = scores.float()
    pruner = HIVTP(r=r, k=k, c=c)
    stages = pruner.stages(scores)
    windows = (stages > 0).view(tiles, n // c, c, n // c, c).sum((2, 4))
    assert (windows >= 1).all()
    assert ((stages > 0).sum(1) <= pruner.budget(1, n * n)).all()
    for tile in range(tiles):  # a tile does not see its neighbours
        assert torch.equal(stages[tile], pruner.stages(scores[tile : tile + 1])[0])


def features(tiles=1, n=12, layers=(7, 8, 9, 10), seed=0):
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=rng)

    return VisionFeatures(
        tokens=draw(tiles, n * n, 16),
        cls=draw(tiles, 16),
        queries={layer: draw(tiles, 4, 1 + n * n, 8) for layer in layers},
        keys={layer: draw(tiles, 4, 1 + n * n, 8) for layer in layers},
    )


def test_received_attention_is_equations_2_to_4():
    image = features(tiles=2, n=4, layers=(7, 8))
    expected = torch.zeros(2, 16, dtype=torch.float64)
    for layer in (7, 8):
        for tile in range(2):
            for head in range(4):
                q = image.queries[layer][tile, head].double()
                k = image.keys[layer][tile, head].double()
                attention = (q @ k.T / 8**0.5).softmax(-1)
                for t in range(16):
                    expected[tile, t] += sum(attention[j, t + 1] for j in range(17)) / 17 / 8
    ours = received_attention(image, (7, 8))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-8)


def test_select_keeps_rows_of_the_image_in_reading_order():
    image = features(tiles=3)
    kept = HIVTP(k=25).select(image)
    order = kept.tile * 144 + kept.patch
    assert (order.diff() > 0).all()
    assert torch.equal(kept.tokens, image.tokens[kept.tile, kept.patch])
    stages = HIVTP(k=25).stages(received_attention(image, (7, 8, 9, 10)))
    assert torch.equal((stages > 0).nonzero(), torch.stack([kept.tile, kept.patch], 1))


def test_fill_tops_every_tile_up_to_p_max():
    image = features(tiles=3)
    plain, full = HIVTP(k=50).select(image), HIVTP(k=50, fill=True).select(image)
    p_max = HIVTP(k=50).budget(1, 144)
    assert full.tile.bincount().tolist() == [p_max] * 3
    assert len(plain) < len(full)
    here = set(zip(full.tile.tolist(), full.patch.tolist(), strict=True))
    assert set(zip(plain.tile.tolist(), plain.patch.tolist(), strict=True)) <= here


@pytest.mark.parametrize("setting", [(2, 25, 2), (2, 14, 3), (3, 25, 2), (2, 50, None)])
@pytest.mark.parametrize("fill", [False, True])
def test_inside_is_the_algorithm_without_the_letterbox(setting, fill):
    r, k, c = setting
    image = features(tiles=3)
    shown = torch.ones(3, 144, dtype=torch.bool)
    shown[1].view(12, 12)[:5] = False  # a letterbox above, and on two sides of the third tile
    shown[2].view(12, 12)[:, :3] = shown[2].view(12, 12)[:, 11:] = False
    pruner = HIVTP(r=r, k=k, c=c, fill=fill)
    kept = pruner.select_inside(image, shown)
    scores = received_attention(image, pruner.layers)
    for tile, (row, seen) in enumerate(zip(scores.tolist(), shown.tolist(), strict=True)):
        row = [score if here else -1.0 for score, here in zip(row, seen, strict=True)]
        chosen = set().union(*literal(row, 12, r, k, c))
        chosen = {t for t in chosen if seen[t]}
        if fill:
            rest = sorted(set(range(144)) - chosen, key=lambda t: (-row[t], t))
            most = min(pruner.budget(1, 144), sum(seen))
            chosen |= set(rest[: most - len(chosen)])
        assert set(kept.patch[kept.tile == tile].tolist()) == chosen


def test_an_image_is_pruned_alike_alone_and_among_others():
    image, other = features(seed=1), features(seed=2)
    both = replace(
        image,
        tokens=torch.cat([other.tokens, image.tokens]),
        queries={key: torch.cat([other.queries[key], q]) for key, q in image.queries.items()},
        keys={key: torch.cat([other.keys[key], k]) for key, k in image.keys.items()},
    )
    alone, among = HIVTP().select(image), HIVTP().select(both)
    assert torch.equal(alone.patch, among.patch[among.tile == 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 5}, r"r=5 does not divide the 12 x 12 grid; choose \[1, 2, 3, 4, 6, 12\]"),
        ({"c": 7}, "c=7 does not divide"),
        ({"k": 0}, r"k must be a percentage in \(0, 100\], got 0"),
        ({"k": 101}, "got 101"),
        ({"k": "half"}, "got 'half'"),
        ({"r": 0}, "r must be a whole number from 1, got 0"),
        ({"c": 1.5}, "c must be a whole number"),
        ({"layers": ()}, "layers is empty"),
        ({"k": 0.1, "c": None}, "keeps no token"),
        ({"layers": "7-10"}, r"layers must be such as 7\+8\+9\+10"),
        ({"radius": 2}, "takes no radius; it takes .*fill"),
    ],
)
def test_bad_settings_name_the_value_and_the_remedy(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_pruner("hivtp", **arguments).select(features())


def test_scores_that_are_not_numbers_are_refused():
    image = features()
    image.queries[8][0, 0, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        HIVTP().select(image)


def test_default_layers_are_for_24_layers_only():
    HIVTP().check(24, 576)
    HIVTP(layers=(4, 5)).check(12, 144)
    HIVTP(layers=(7, 8, 9, 10)).check(12, 144)  # named by hand: taken as meant
    with pytest.raises(ValueError, match="this tower has 12: give layers="):
        HIVTP().check(12, 144)
    with pytest.raises(ValueError, match=r"\[13\] lie outside 1..12"):
        HIVTP(layers=(4, 13)).check(12, 144)


def test_a_command_line_spells_every_argument():
    pruner = build_pruner("hivtp", r="3", k="25", c="none", layers="7+8", fill="true")
    assert pruner == HIVTP(r=3, k=25, c=None, layers=(7, 8), fill=True)
    with pytest.raises(ValueError, match=r"unknown pruner 'hivpt'; choose from .*hivtp"):
        build_pruner("hivpt")
