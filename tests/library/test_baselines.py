"""Each method against a slow literal version of it, and against worked examples."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from features import cast, random_features, with_attention

from llava_hivtp.pruners import PRUNERS, build_pruner
from llava_hivtp.vision import VisionFeatures

N, n = 36, 6
KEEP = (0.75, 0.5, 0.4, 0.25)
Token = tuple[int, int, np.ndarray]  # tile, patch, token


# ---------------------------------------------------------------- the literal versions


def attention_map(features: VisionFeatures, layer: int, tile: int) -> np.ndarray:
    """Post-softmax attention of one layer, (H, 1 + N, 1 + N)."""
    queries = features.queries[layer][tile].double().numpy()
    keys = features.keys[layer][tile].double().numpy()
    heads = []
    for q, k in zip(queries, keys, strict=True):
        weights = np.exp(q @ k.T / math.sqrt(q.shape[1]))
        heads.append(weights / weights.sum(1, keepdims=True))
    return np.stack(heads)


def received(features: VisionFeatures, layer: int, tile: int) -> list[float]:
    attention = attention_map(features, layer, tile)
    return [attention[:, :, 1 + t].mean() for t in range(features.n_patches)]


def from_cls(features: VisionFeatures, layer: int, tile: int) -> list[float]:
    attention = attention_map(features, layer, tile)
    return [attention[:, 0, 1 + t].mean() for t in range(features.n_patches)]


def top(scores: list[float], count: int) -> list[int]:
    """Best first; ties go to the lowest index."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


def rows_of(features: VisionFeatures, tile: int) -> np.ndarray:
    return features.tokens[tile].double().numpy()


def patches(features: VisionFeatures, chosen: list[list[int]]) -> list[Token]:
    return [(t, p, rows_of(features, t)[p]) for t, kept in enumerate(chosen) for p in sorted(kept)]


def fopru(features: VisionFeatures, count: int) -> list[Token]:
    return patches(
        features, [top(received(features, 23, t), count) for t in range(features.n_tiles)]
    )


def fopru_rows(features: VisionFeatures, count: int) -> list[Token]:
    chosen = []
    for t in range(features.n_tiles):
        scores = received(features, 23, t)
        sums = [sum(scores[y * n : (y + 1) * n]) for y in range(n)]
        chosen.append([y * n + x for y in top(sums, count) for x in range(n)])
    return patches(features, chosen)


def visionzip_tile(features: VisionFeatures, tile: int, d: int, c: int) -> list[Token]:
    hidden = np.concatenate([features.cls[tile][None].double().numpy(), rows_of(features, tile)])
    metric = features.keys[23][tile].double().numpy().mean(0)
    kept = sorted([0] + [1 + p for p in top(from_cls(features, 23, tile), d - 1)])
    rest = [i for i in range(1 + features.n_patches) if i not in kept]
    step = max(1, len(rest) // c)
    targets = list(range(0, len(rest), step))[:c]
    assigned: dict[int, list[int]] = {j: [] for j in targets}
    for i in range(len(rest)):
        if i not in targets:
            likeness = [cosine(metric[rest[i]], metric[rest[j]]) for j in targets]
            assigned[targets[int(np.argmax(likeness))]].append(i)
    tokens = [(tile, i - 1, hidden[i]) for i in kept]
    for j in targets:
        total = sum((hidden[rest[i]] for i in assigned[j]), np.zeros(hidden.shape[1]))
        tokens.append((tile, -1, hidden[rest[j]] + total / max(1, len(assigned[j]))))
    return tokens


def visionzip(features: VisionFeatures, d: int, c: int) -> list[Token]:
    tiles = [visionzip_tile(features, t, d, c) for t in range(features.n_tiles)]
    order = list(tiles[0])
    for part in (slice(1, d), slice(0, 1), slice(d, d + c)):
        for tile in tiles[1:]:
            order += tile[part]
    return order


def prumerge_attention(features: VisionFeatures, tile: int) -> tuple[list[float], np.ndarray]:
    """CLS attention with one head over the full width, and the patches' keys."""
    query = np.concatenate(features.queries[24][tile].double().numpy(), axis=-1)[0]
    keys = np.concatenate(features.keys[24][tile].double().numpy(), axis=-1)
    weights = np.exp(keys @ query / math.sqrt(len(query)))
    return list((weights / weights.sum())[1:]), keys[1:]


def prumerge_outliers(a: list[float]) -> int:
    first, third = np.percentile(np.array(a, dtype=np.float32), [25, 75])
    return sum(x > third + 1.5 * (third - first) for x in a)


def prumerge_tile(features: VisionFeatures, tile: int, centres: list[int]) -> list[Token]:
    a, keys = prumerge_attention(features, tile)
    x = rows_of(features, tile)
    tokens = []
    for i in centres:
        others = [j for j in range(len(a)) if j != i]
        likeness = [cosine(keys[i], keys[j]) for j in others]
        merged = x[i].copy()
        for j in top(likeness, 32):
            merged += a[others[j]] * x[others[j]]
        tokens.append((tile, -1, merged))
    rest = [j for j in range(len(a)) if j not in centres]
    extra = sum((a[j] * x[j] for j in rest), np.zeros(x.shape[1]))
    return [*tokens, (tile, -1, extra)]


def prumerge(features: VisionFeatures, count: int, adaptive: bool) -> list[Token]:
    tokens = []
    for t in range(features.n_tiles):
        a, _ = prumerge_attention(features, t)
        m = min(prumerge_outliers(a), count - 1) if adaptive else count - 1
        tokens += prumerge_tile(features, t, top(a, m))
    return tokens


def prumerge_plus(features: VisionFeatures, count: int, adaptive: bool) -> list[Token]:
    tokens = []
    for t in range(features.n_tiles):
        a, _ = prumerge_attention(features, t)
        outliers = prumerge_outliers(a)
        if adaptive:
            rho = outliers / len(a)
            found = top(a, min(outliers, count - 1))
            step = int(1 / rho) if rho else 3 * len(a)
            fill = [s for s in range(0, len(a), max(1, int(step / 3))) if s not in found]
        else:
            found = top(a, min(outliers, (count - 1) // 2))
        if not adaptive or len(found) + len(fill) > count - 1:
            rest = [p for p in range(len(a)) if p not in found]
            wanted = count - 1 - len(found)
            fill = [rest[int((i + 0.5) * len(rest) / wanted)] for i in range(wanted)]
        tokens += prumerge_tile(features, t, found + fill)
    return tokens


def hired(features: VisionFeatures, keep: float, alpha: float, faithful: bool) -> list[Token]:
    tiles, count = features.n_tiles, features.n_patches
    total = int(Fraction(str(keep)) * tiles * count)
    if tiles == 1:
        return patches(features, [top(from_cls(features, 23, 0), total)])
    full = min(int(Fraction(str(alpha)) * total), count)
    columns, rows = features.tile_grid
    mass = [0] * (tiles - 1)
    for p in top(from_cls(features, 1, 0), int((1 - Fraction(str(alpha))) * count)):
        if faithful:
            mass[p // (count // (tiles - 1))] += 1
        else:
            y, x = divmod(p, n)
            mass[(y // (n // rows)) * columns + x // (n // columns)] += 1
    sub = min(total - full, (tiles - 1) * count)
    exact = [Fraction(sub * m, sum(mass)) for m in mass]
    budgets = [int(b) for b in exact]
    if faithful:
        budgets = [int(np.float32(m) / np.float32(sum(mass)) * np.float32(sub)) for m in mass]
    else:
        for i in top([float(b - int(b)) for b in exact], sub - sum(budgets)):
            budgets[i] += 1
    assert max(budgets) <= count, "the literal version knows no overflow"
    chosen = [top(from_cls(features, 23, t), budget) for t, budget in enumerate([full, *budgets])]
    return patches(features, chosen)


def vispruner(features: VisionFeatures, count: int, important: float) -> list[Token]:
    chosen = []
    for t in range(features.n_tiles):
        x, order = rows_of(features, t), top(from_cls(features, 23, t), N)
        first = int(Fraction(str(important)) * count)
        kept, residual = order[:first], order[first:]
        wanted = count - first
        while wanted and len(residual) > wanted:
            even, odd = residual[0::2], residual[1::2]
            alike = [max(cosine(x[i], x[j]) for j in odd) for i in even]
            remove = min(8, len(residual) - wanted, len(even))
            residual = [even[i] for i in top(alike, len(even))[remove:]] + odd
        chosen.append(kept + (residual if wanted else []))
    return patches(features, chosen)


def divprune(features: VisionFeatures, count: int) -> list[Token]:
    chosen = []
    for t in range(features.n_tiles):
        x = features.project(features.tokens[t]).double().numpy()
        distance = [[1 - cosine(a, b) for b in x] for a in x]
        picks = top([sorted(distance[i])[1] for i in range(N)], 1)
        while len(picks) < count:
            left = [i for i in range(N) if i not in picks]
            nearest = [min(distance[j][i] for j in picks) for i in left]
            picks.append(left[top(nearest, 1)[0]])
        chosen.append(picks)
    return patches(features, chosen)


def hiprune(features: VisionFeatures, count: int, alpha: float) -> list[Token]:
    chosen = []
    for t in range(features.n_tiles):
        anchors = top(received(features, 9, t), min(round(alpha * count / 5), count // 5))
        kept = set()
        for y, x in (divmod(p, n) for p in anchors):
            for row, column in ((y, x), (y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if 0 <= row < n and 0 <= column < n:
                    kept.add(row * n + column)
        deep = received(features, 23, t)
        registers = [p for p in top(deep, N) if p not in kept][: count - len(kept)]
        chosen.append([*kept, *registers])
    return patches(features, chosen)


def scope(features: VisionFeatures, count: int, saliency, alpha: float) -> list[Token]:
    chosen = []
    for t in range(features.n_tiles):
        x, weight = rows_of(features, t), saliency(features, 23, t)
        likeness = [[cosine(a, b) for b in x] for a in x]
        covered, picks = [0.0] * len(x), []
        while len(picks) < count:
            left = [i for i in range(len(x)) if i not in picks]
            gains = [
                sum(max(0.0, likeness[i][j] - covered[j]) for j in range(len(x)))
                * weight[i] ** alpha
                for i in left
            ]
            picks.append(left[top(gains, 1)[0]])
            covered = [max(c, likeness[picks[-1]][j]) for j, c in enumerate(covered)]
        chosen.append(picks)
    return patches(features, chosen)


def cover(
    features: VisionFeatures, count: int, importance: str, reach: float | None = None
) -> list[Token]:
    """Farthest times the fourth root of importance, until distinctness is covered."""
    chosen = []
    for t in range(features.n_tiles):
        x = features.half_project(features.tokens[t]).double().numpy()
        seen = [received(features, layer, t) for layer in (7, 8, 9)]
        found = {"cls": from_cls(features, 23, t), "received": np.mean(seen, 0), "equal": [1] * N}
        weight = [value**0.25 for value in found[importance]]
        distinct = [max(0.0, 1 - cosine(a, x.mean(0))) for a in x]
        near = [[cosine(a, b) for b in x] for a in x]
        picks = top(weight, 1)
        while len(picks) < count:
            covered = [max(0.0, *(near[i][p] for p in picks)) for i in range(N)]
            share = sum(d * c for d, c in zip(distinct, covered, strict=True)) / sum(distinct)
            if reach is not None and share >= reach:
                break
            left = [i for i in range(N) if i not in picks]
            far = [weight[i] * min(1 - near[i][p] for p in picks) for i in left]
            picks.append(left[top(far, 1)[0]])
        chosen.append(picks)
    return patches(features, chosen)


def holov(features: VisionFeatures, count: int, crops: int, alpha: float) -> list[Token]:
    """The released code's steps, and the best attended of the others where it pads with zeros."""
    chosen = []
    for t in range(features.n_tiles):
        x = features.project(features.tokens[t]).double().numpy()
        attention = from_cls(features, 23, t)
        size, longer = divmod(len(x), crops)
        strips, start = [], 0
        for i in range(crops):
            stop = start + size + (i < longer)
            strips.append(list(range(start, stop)))
            start = stop
        scores = []
        for strip in strips:
            spread = []
            for i in strip:
                row = [0.0 if i == j else cosine(x[i], x[j]) for j in strip]
                mean = sum(row) / (len(strip) - 1)
                spread.append(sum((c - mean) ** 2 for c in row) / (len(strip) - 1))
            scaled = [1e3 * attention[i] for i in strip]
            scale = np.mean(scaled) / (np.mean(spread) + 1e-6)
            scores.append(np.mean(scaled) + alpha * scale * np.mean(spread))
        weights = [score / (sum(scores) + 1e-6) for score in scores]
        shares = [math.floor(weight * count) for weight in weights]
        for i in top(weights, count - sum(shares)):
            shares[i] += 1
        kept = []
        for strip, own in zip(strips, shares, strict=True):
            kept += [strip[i] for i in top([attention[p] for p in strip], own)]
        kept += [p for p in top(attention, len(x)) if p not in kept][: count - len(kept)]
        chosen.append(kept)
    return patches(features, chosen)


def cdpruner(features: VisionFeatures, count: int) -> list[Token]:
    """The definition: the determinant of the kernel over the picks, computed anew every time."""
    words = features.question.double().numpy()
    projected = features.project(features.tokens).double().numpy()
    relevance = np.array([[np.mean([cosine(p, w) for w in words]) for p in x] for x in projected])
    relevance = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())
    chosen = []
    for x, r in zip(projected, relevance, strict=True):
        kernel = np.array([[r[i] * cosine(x[i], x[j]) * r[j] for j in range(N)] for i in range(N)])
        picks: list[int] = []
        while len(picks) < count:
            left = [i for i in range(N) if i not in picks]
            volumes = [np.linalg.slogdet(kernel[np.ix_([*picks, i], [*picks, i])])[1] for i in left]
            picks.append(left[top(volumes, 1)[0]])
        chosen.append(picks)
    return patches(features, chosen)


def avgpool(features: VisionFeatures, count: int) -> list[Token]:
    rows = math.isqrt(count)
    columns = min(count // rows, n)
    tokens = []
    for t in range(features.n_tiles):
        x = rows_of(features, t).reshape(n, n, -1)
        for i in range(rows):
            for j in range(columns):
                ys = range(i * n // rows, math.ceil((i + 1) * n / rows))
                xs = range(j * n // columns, math.ceil((j + 1) * n / columns))
                mean = np.mean([x[y, z] for y in ys for z in xs], axis=0)
                middle = int((i + 0.5) * n / rows) * n + int((j + 0.5) * n / columns)
                tokens.append((t, middle, mean))
    return tokens


def bayer(side: int) -> np.ndarray:
    """The textbook recursion of the ordered-dithering matrix."""
    if side == 1:
        return np.zeros((1, 1), dtype=int)
    half = 4 * bayer(side // 2)
    return np.block([[half, half + 2], [half + 3, half + 1]])


def uniform(features: VisionFeatures, count: int) -> list[Token]:
    order = bayer(8)[:n, :n].flatten()
    return patches(features, [top(list(-order), count)] * features.n_tiles)


# ---------------------------------------------------------------- against the literal versions


CASES = [
    *[("fopru", {"keep": k}, lambda f, k=k: fopru(f, int(k * N))) for k in KEEP],
    *[
        ("fopru", {"keep": k, "strategy": "row"}, lambda f, k=k: fopru_rows(f, int(k * n)))
        for k in KEEP
    ],
    *[
        ("visionzip", {"dominant": d, "contextual": c}, lambda f, d=d, c=c: visionzip(f, d, c))
        for d, c in ((23, 4), (15, 3), (1, 1), (6, 31), (10, 13))
    ],
    *[
        ("prumerge", {"keep": k, "adaptive": a}, lambda f, k=k, a=a: prumerge(f, int(k * N), a))
        for k in (*KEEP, 0.06)
        for a in (False, True)
    ],
    *[
        (
            "prumerge_plus",
            {"keep": k, "adaptive": a},
            lambda f, k=k, a=a: prumerge_plus(f, int(k * N), a),
        )
        for k in (1, *KEEP, 0.06)
        for a in (False, True)
    ],
    *[
        (
            "hired",
            {"keep": k, "alpha": a, "faithful": f},
            lambda x, k=k, a=a, f=f: hired(x, k, a, f),
        )
        for k, a in ((0.4, 0.5), (0.25, 0.5), (0.33, 0.7), (0.25, 0.2))
        for f in (False, True)
    ],
    *[
        ("vispruner", {"keep": k, "important": i}, lambda f, k=k, i=i: vispruner(f, int(k * N), i))
        for k in (*KEEP, 0.03)
        for i in (0, 0.3, 0.5, 1)
    ],
    *[("divprune", {"keep": k}, lambda f, k=k: divprune(f, int(k * N))) for k in KEEP],
    *[
        ("hiprune", {"keep": k, "alpha": a}, lambda f, k=k, a=a: hiprune(f, int(k * N), a))
        for k in KEEP
        for a in (0.1, 0.7, 1)
    ],
    *[
        (
            "scope",
            {"keep": k, "saliency": word, "alpha": a},
            lambda f, k=k, s=saliency, a=a: scope(f, int(k * N), s, a),
        )
        for k in (*KEEP, 0.03)
        for word, saliency in (("cls", from_cls), ("received", received))
        for a in (0.5, 1, 2.5)
    ],
    *[
        (
            "cover",
            {"keep": k, "importance": w} | ({"layers": (7, 8, 9)} if w == "received" else {}),
            lambda f, k=k, w=w: cover(f, int(k * N), w),
        )
        for k in (0.25, 0.03)
        for w in ("cls", "received", "equal")
    ],
    *[
        ("cover", {"keep": 0.25, "reach": r}, lambda f, r=r: cover(f, int(0.25 * N), "cls", r))
        for r in (0.2, 0.35, 0.6)
    ],
    *[
        (
            "holov",
            {"keep": k, "crops": c, "alpha": a},
            lambda f, k=k, c=c, a=a: holov(f, int(k * N), c, a),
        )
        for k in (*KEEP, 0.03)
        for c, a in ((16, 0.09), (5, 0.09), (1, 2))
    ],
    *[("cdpruner", {"keep": k}, lambda f, k=k: cdpruner(f, int(k * N))) for k in (0.4, 0.25, 0.03)],
    *[("avgpool", {"keep": k}, lambda f, k=k: avgpool(f, int(k * N))) for k in (*KEEP, 0.99)],
    *[("uniform", {"keep": k}, lambda f, k=k: uniform(f, int(k * N))) for k in KEEP],
]
IDS = [f"{name}:{','.join(f'{k}={v}' for k, v in args.items())}" for name, args, _ in CASES]


@pytest.mark.parametrize("tiles", [1, 5])
@pytest.mark.parametrize(("name", "arguments", "literal"), CASES, ids=IDS)
def test_method_equals_its_literal_version(name, arguments, literal, tiles: int) -> None:
    for seed in (1, 2):
        features = random_features(tiles, N, width=16, heads=2, seed=seed)
        kept = build_pruner(name, **arguments).select(features)
        expected = literal(features)
        assert kept.tile.tolist() == [tile for tile, _, _ in expected]
        assert kept.patch.tolist() == [patch for _, patch, _ in expected]
        tokens = torch.from_numpy(np.stack([token for _, _, token in expected])).float()
        torch.testing.assert_close(kept.tokens, tokens, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- identities between methods


@pytest.mark.parametrize("keep", KEEP)
def test_fopru_is_hivtp_at_layer_23_without_regions_and_windows(keep: float) -> None:
    features = random_features(3, 576)
    ours = build_pruner("fopru", keep=keep).select(features)
    theirs = build_pruner("hivtp", r=1, k=100 * keep, c=None, layers=(23,)).select(features)
    assert torch.equal(ours.patch, theirs.patch)
    assert len(ours) == 3 * int(keep * 576)


@pytest.mark.parametrize("keep", KEEP)
def test_hired_on_one_tile_is_the_top_of_cls_attention(keep: float) -> None:
    features = random_features(1, 576)
    hired_kept = build_pruner("hired", keep=keep).select(features).patch
    assert hired_kept.tolist() == sorted(top(from_cls(features, 23, 0), int(keep * 576)))
    vispruner_kept = build_pruner("vispruner", keep=keep, important=1).select(features).patch
    assert torch.equal(hired_kept, vispruner_kept)
    dominant = build_pruner("visionzip", keep=keep).select(features).patch
    assert set(dominant[dominant >= 0].tolist()) < set(hired_kept.tolist())


@pytest.mark.parametrize("keep", KEEP)
def test_hiprune_without_anchors_is_fopru(keep: float) -> None:
    features = random_features(3, 144)
    hiprune_kept = build_pruner("hiprune", keep=keep, alpha=0).select(features)
    assert torch.equal(hiprune_kept.patch, build_pruner("fopru", keep=keep).select(features).patch)


def test_prumerge_plus_without_outliers_spreads_all_centres_evenly() -> None:
    features = with_attention({24: torch.full((1, 36), 0.5)})
    kept = build_pruner("prumerge_plus", keep=0.34).select(features)  # 12 = 11 centres and the rest
    literal = prumerge_tile(features, 0, [int((i + 0.5) * 36 / 11) for i in range(11)])
    expected = torch.from_numpy(np.stack([token for _, _, token in literal])).float()
    torch.testing.assert_close(kept.tokens, expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- worked examples


def test_prumerge_plus_keeps_its_budget_where_the_release_counts_patches_twice() -> None:
    """With a fixed ratio r the release takes the top floor(r N) and every 1/r-th patch."""
    features = random_features(1, seed=3)
    for keep in (0.25, 0.5):
        kept = build_pruner("prumerge_plus", keep=keep).select(features)
        count = features.n_patches
        attended = top(prumerge_attention(features, 0)[0], int(keep * count))
        grid = list(range(0, count, int(1 / keep)))
        assert len(kept) == int(keep * count) < len(attended) + len(grid)
        assert set(attended) & set(grid)  # those it would take twice
    assert not build_pruner("prumerge_plus").adaptive  # the release's default is the adaptive form
    assert "That is a rule of ours" in " ".join(PRUNERS["prumerge_plus"].__doc__.split())


@pytest.mark.parametrize(
    ("keep", "split"),
    [(0.75, (364, 68)), (0.5, (243, 45)), (0.4, (194, 36)), (0.25, (121, 23)), (0.112, (54, 10))],
)
def test_visionzip_splits_its_budget_54_to_10(keep: float, split: tuple[int, int]) -> None:
    pruner = build_pruner("visionzip", keep=keep)
    assert pruner.split(576) == split
    assert pruner.budget(5, 576) == 5 * sum(split)


def test_visionzip_puts_cls_first() -> None:
    features = random_features(4, 36)
    kept = build_pruner("visionzip", dominant=5, contextual=2).select(features)
    assert torch.equal(kept.tokens[0], features.cls[0])
    assert kept.tile.tolist() == [0] * 7 + [1] * 4 + [2] * 4 + [3] * 4 + [1, 2, 3, 1, 1, 2, 2, 3, 3]
    assert kept.patch[0] == -1
    assert (kept.patch[5:7] == -1).all()
    assert (kept.patch[7:19] >= 0).all()
    assert (kept.patch[19:] == -1).all()
    assert torch.equal(kept.tokens[19:22], features.cls[1:])


def test_visionzip_adds_the_mean_of_what_it_merges_to_the_target() -> None:
    features = with_attention({23: torch.ones(1, 4)})
    tokens = torch.full((1, 4, 16), 3.0)
    tokens[0, 1] = 1  # patch 0 is dominant; of the rest, patch 1 is the target
    features = replace(features, tokens=tokens)
    kept = build_pruner("visionzip", dominant=2, contextual=1).select(features)
    assert torch.equal(kept.tokens[2], torch.full((16,), 4.0))


def test_visionzip_gives_equal_keys_to_the_first_target() -> None:
    features = with_attention({23: torch.ones(1, 9)})
    kept = build_pruner("visionzip", dominant=1, contextual=3).select(features)
    x = features.tokens[0]
    torch.testing.assert_close(kept.tokens[1], x[0] + x[[1, 2, 4, 5, 7, 8]].mean(0))
    assert torch.equal(kept.tokens[2:], x[[3, 6]])


@pytest.mark.parametrize("keep", [*KEEP, 1])
def test_prumerge_keeps_one_centre_less_than_its_budget_and_the_rest(keep: float) -> None:
    features = random_features(5, 576)
    for name in ("prumerge", "prumerge_plus"):
        kept = build_pruner(name, keep=keep).select(features)
        assert kept.tile.bincount().tolist() == [int(keep * 576)] * 5


def test_prumerge_without_attention_returns_its_centres_as_they_are() -> None:
    features = random_features(1, 36)
    features.queries[24][:, :, 0] = 0
    features.queries[24][:, :, 0, 0] = 100
    features.keys[24][:, :, 0, 0] = 100  # CLS attends to itself alone
    kept = build_pruner("prumerge", keep=0.25).select(features)
    assert torch.equal(kept.tokens[:-1], features.tokens[0, :8])
    assert not kept.tokens[-1].any()


def test_prumerge_puts_the_most_attended_centre_first() -> None:
    attention = torch.full((1, 36), 1e-6)
    attention[0, [20, 3, 30]] = torch.tensor([4.0, 3.0, 2.0])
    features = with_attention({24: attention})
    kept = build_pruner("prumerge", adaptive=True).select(features)
    assert len(kept) == 4
    literal = prumerge_tile(features, 0, [20, 3, 30])
    expected = torch.from_numpy(np.stack([token for _, _, token in literal])).float()
    torch.testing.assert_close(kept.tokens, expected, rtol=1e-4, atol=1e-4)


def test_prumerge_without_outliers_keeps_only_the_rest() -> None:
    features = with_attention({24: torch.ones(2, 36)})
    kept = build_pruner("prumerge", adaptive=True).select(features)
    torch.testing.assert_close(kept.tokens, features.tokens.mean(1))
    kept = build_pruner("prumerge_plus", adaptive=True).select(features)
    assert kept.tile.tolist() == [0, 0, 1, 1]


def test_prumerge_adapts_to_every_tile_by_itself() -> None:
    attention = torch.full((2, 36), 1e-3)
    attention[0, :2] = 1.0
    attention[1, :5] = 0.02
    kept = build_pruner("prumerge", adaptive=True).select(with_attention({24: attention}))
    assert kept.tile.bincount().tolist() == [3, 6]


HIRED_COUNTS = {  # (tiles, keep) -> base, all others together, of 576 patches each
    (1, 0.75): (432, 0),
    (1, 0.5): (288, 0),
    (1, 0.4): (230, 0),
    (1, 0.25): (144, 0),
    (3, 0.75): (576, 720),
    (3, 0.5): (432, 432),
    (3, 0.4): (345, 346),
    (3, 0.25): (216, 216),
    (4, 0.75): (576, 1152),
    (4, 0.5): (576, 576),
    (4, 0.4): (460, 461),
    (4, 0.25): (288, 288),
    (5, 0.75): (576, 1584),
    (5, 0.5): (576, 864),
    (5, 0.4): (576, 576),
    (5, 0.25): (360, 360),
}


@pytest.mark.parametrize(("tiles", "keep"), HIRED_COUNTS)
def test_hired_spends_its_whole_budget(tiles: int, keep: float) -> None:
    features = random_features(tiles, 576)
    base, others = HIRED_COUNTS[tiles, keep]
    pruner = build_pruner("hired", keep=keep)
    counts = pruner.select(features).tile.bincount(minlength=tiles).tolist()
    assert counts == pruner.counts(features)
    assert (counts[0], sum(counts[1:])) == (base, others)
    assert max(counts) <= 576
    faithful = build_pruner("hired", keep=keep, faithful=True).counts(features)
    assert faithful[0] == base
    assert 0 <= others - sum(faithful[1:]) <= max(0, tiles - 2)  # rounding down, tile by tile


def right_half() -> VisionFeatures:
    """Five tiles of 24 x 24 patches; the base image attracts attention in its right half."""
    attention = torch.full((5, 24, 24), 0.1)
    attention[0, :, 12:] = 1
    return with_attention({1: attention.flatten(1), 23: torch.ones(5, 576)})


@pytest.mark.parametrize(
    ("arguments", "counts"),
    [
        ({"keep": 0.25}, [360, 0, 180, 0, 180]),
        ({"keep": 0.25, "faithful": True}, [360, 90, 90, 90, 90]),
        ({"keep": 0.75}, [576, 216, 576, 216, 576]),  # what overflows goes to the other tiles
        ({"keep": 0.75, "faithful": True}, [576, 396, 396, 396, 396]),
        ({"keep": 1}, [576, 576, 576, 576, 576]),
        ({"keep": 0.1, "alpha": 0}, [0, 72, 72, 72, 72]),  # all patches are counted: equal shares
        ({"keep": 0.25, "alpha": 1}, [576, 36, 36, 36, 36]),  # none is counted: equal shares
    ],
)
def test_hired_follows_the_right_half_in_two_dimensions(arguments: dict, counts: list) -> None:
    assert build_pruner("hired", **arguments).counts(right_half()) == counts


def test_hired_gives_remainders_to_the_largest_fractions() -> None:
    attention = torch.full((4, 12, 12), 0.1)
    attention[0, 0, :12] = attention[0, 4, :12] = attention[0, 5, :4] = attention[0, 8, :8] = 1
    features = with_attention({1: attention.flatten(1), 23: torch.ones(4, 144)})
    # alpha=0.75 counts 36 patches: 12, 16 and 8 in the three tiles on top of one another
    features = replace(features, tile_grid=(1, 3))
    counts = build_pruner("hired", keep=0.05, alpha=0.75).counts(features)  # 28 = 21 + 7
    assert counts == [21, 2, 3, 2]  # of 7: 2.33, 3.11, 1.56
    assert build_pruner("hired", keep=0.05, alpha=0.75, faithful=True).counts(features) == [
        21, 2, 3, 1,
    ]  # fmt: skip


def test_hired_asks_where_the_tiles_lie() -> None:
    features = replace(random_features(5, 36), tile_grid=(0, 0))
    with pytest.raises(ValueError, match="HiRED needs to know where 4 tiles lie"):
        build_pruner("hired", keep=0.5).select(features)


def test_fopru_without_the_row_of_cls_is_the_mean_over_patches() -> None:
    features = random_features(2, 36, layers=(23,))
    queries, keys = features.queries[23].double(), features.keys[23].double()
    weights = (queries @ keys.transpose(2, 3) * queries.shape[3] ** -0.5).softmax(-1)
    expected = weights[:, :, 1:, 1:].mean((1, 2))  # (T, N)
    score = build_pruner("fopru", keep=0.25, cls_row=False).score(features)
    torch.testing.assert_close(score.double(), expected, rtol=1e-5, atol=1e-7)
    kept = build_pruner("fopru", keep=0.25, cls_row=False).select(features)
    assert kept.patch[:9].tolist() == sorted(expected[0].topk(9).indices.tolist())
    assert not torch.allclose(score, build_pruner("fopru").score(features))


def test_hired_faithful_rounds_its_total_as_released() -> None:
    features = random_features(5, 576)
    pruner = build_pruner("hired", keep=0.7, faithful=True)
    assert int(2880 * 0.7) == pruner.budget(5, 576) == 2015
    assert pruner.counts(features)[0] == 576
    assert sum(pruner.counts(features)) <= 2015
    assert build_pruner("hired", keep=0.7).budget(5, 576) == 2016


def test_fopru_breaks_ties_between_rows_from_the_top() -> None:
    attention = torch.ones(1, 24, 24)
    attention[0, 5] = 2
    features = with_attention({23: attention.flatten(1)})
    kept = build_pruner("fopru", keep=0.25, strategy="row").select(features)
    assert kept.patch.tolist() == list(range(6 * 24))
    assert build_pruner("fopru", keep=0.4, strategy="row").budget(1, 576) == 216


def test_hiprune_anchors_have_no_neighbours_beyond_the_grid() -> None:
    middle, deep = torch.full((1, 36), 1e-3), torch.full((1, 36), 1e-3)
    middle[0, 11] = 1  # last in the second row: its flat successor starts the third
    deep[0, [0, 1, 2, 3, 6, 7, 8, 9]] = 1
    kept = build_pruner("hiprune", keep=0.2, alpha=0.8).select(
        with_attention({9: middle, 23: deep})
    )
    assert kept.patch.tolist() == [0, 1, 2, 5, 10, 11, 17]  # 11 and its three neighbours, registers


def test_divprune_takes_one_of_each_kind_before_a_second_of_any() -> None:
    features = random_features(2, 36)
    kinds = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    features = replace(features, tokens=kinds[torch.arange(36) // 9].repeat(2, 1, 1))
    kept = build_pruner("divprune", keep=0.12).select(features)  # 4 of 36
    assert (kept.patch // 9).tolist() == [0, 1, 2, 3] * 2
    assert len(build_pruner("divprune", keep=0.5).select(features)) == 36  # none of them twice


def test_an_image_has_as_many_tokens_as_it_holds_different_things() -> None:
    """Tiles of 1, 3 and 6 kinds of patches: reach asks for one of each, whatever the others do."""
    kinds = torch.tensor([1, 3, 6])
    tokens = torch.eye(8)[(torch.arange(36) % kinds[:, None])]
    features = VisionFeatures(tokens, tokens[:, 0], {}, {}, half_project=lambda x: x)
    alike = {"keep": 0.5, "importance": "equal"}
    kept = build_pruner("cover", **alike, reach=0.99).select(features)
    assert kept.tile.bincount().tolist() == [1, 3, 6]
    needed = build_pruner("cover", **alike).needed_above(features)
    assert torch.isfinite(needed).sum(1).tolist() == [18, 18, 18]
    assert (needed == 0).sum(1).tolist() == [1, 1, 1]
    same = replace(features, tokens=features.tokens[:1].expand(3, -1, -1))  # nothing is distinct
    assert len(build_pruner("cover", importance="equal", reach=1.0).select(same)) == 3


def test_scope_covers_every_kind_before_it_covers_one_twice() -> None:
    kinds = torch.eye(16)[torch.arange(36) // 9].repeat(2, 1, 1)  # four kinds, nine of each
    attention = torch.linspace(1, 2, 36).repeat(2, 1)
    features = replace(with_attention({23: attention}), tokens=kinds)
    kept = build_pruner("scope", keep=0.12).select(features)  # 4 of 36
    assert kept.patch.tolist() == [8, 17, 26, 35] * 2  # of each kind the most attended one
    kept = build_pruner("scope", keep=0.17).select(features)  # 6: nothing is left to cover
    assert kept.patch.tolist() == [0, 1, 8, 17, 26, 35] * 2


def test_holov_spends_its_budget_by_attention_whatever_the_variance() -> None:
    features = random_features(3, 576)
    shares = [
        build_pruner("holov", keep=0.1, alpha=alpha).select(features).patch // 36
        for alpha in (0, 5)
    ]
    assert torch.equal(*shares)


def test_holov_gives_to_others_what_a_strip_cannot_take() -> None:
    attention = torch.full((1, 36), 1e-4)
    attention[0, 6:12] = 1  # all of the second of six strips
    attention[0, [20, 30]] = 2e-4
    features = with_attention({23: attention})
    kept = build_pruner("holov", keep=0.25, crops=6).select(features)  # 9, of which it takes 6
    assert kept.patch.tolist() == [0, *range(6, 12), 20, 30]
    assert torch.equal(kept.tokens, features.tokens[0, kept.patch])  # no zeros for padding


def test_cdpruner_takes_what_the_question_names_and_one_of_each_kind() -> None:
    kinds = torch.eye(16)[torch.arange(36) // 9][None]  # four kinds, nine of each
    features = replace(random_features(1, 36), tokens=kinds, project=lambda tokens: tokens)
    asked = torch.eye(16)[[1]] + 0.1 * torch.eye(16)[[3]] + 0.2 * torch.eye(16)[[0]]
    pruner = build_pruner("cdpruner", keep=0.12)  # 4 of 36
    kept = pruner.select(replace(features, question=asked)).patch
    assert kept.tolist() == [0, 9, 18, 27]
    kept = build_pruner("cdpruner", keep=0.2).select(replace(features, question=asked)).patch
    assert kept.tolist() == [0, 9, 10, 11, 12, 18, 27]  # the others by relevance alone


def test_cdpruner_with_a_question_like_all_patches_is_diversity_alone() -> None:
    features = random_features(2, 36)
    flat = replace(features, project=lambda x: torch.cat([x, x.new_ones(*x.shape[:2], 1)], 2))
    nothing = replace(flat, question=torch.zeros(3, 17))  # a zero has cosine 0 to all
    assert len(build_pruner("cdpruner", keep=0.5).select(nothing)) == 36
    lengths = torch.stack(
        [kept.float() for kept in build_pruner("cdpruner", keep=1).score(nothing)]
    )
    assert lengths.sort().values.tolist() == [list(range(1, 37))] * 2


@pytest.mark.parametrize("name", ["divprune", "holov", "cdpruner"])
def test_what_compares_projected_tokens_needs_a_projector(name: str) -> None:
    with pytest.raises(ValueError, match="give VisionFeatures.project"):
        build_pruner(name).select(replace(random_features(), project=None))


def test_cover_needs_the_projector_up_to_its_last_layer() -> None:
    with pytest.raises(ValueError, match="give VisionFeatures.half_project"):
        build_pruner("cover").select(replace(random_features(), half_project=None))


def test_uniform_is_a_grid_at_a_quarter_and_a_checkerboard_at_a_half() -> None:
    features = random_features(1, 576)
    y, x = np.divmod(np.arange(576), 24)
    quarter = build_pruner("uniform", keep=0.25).select(features).patch
    assert quarter.tolist() == np.flatnonzero((y % 2 == 0) & (x % 2 == 0)).tolist()
    half = build_pruner("uniform", keep=0.5).select(features).patch
    assert half.tolist() == np.flatnonzero((y + x) % 2 == 0).tolist()


@pytest.mark.parametrize("keep", KEEP)
def test_uniform_leaves_no_part_of_the_image_out(keep: float) -> None:
    kept = build_pruner("uniform", keep=keep).select(random_features(1, 576)).patch
    mask = torch.zeros(576).index_fill(0, kept, 1).view(1, 1, 24, 24)
    parts = 64 * torch.nn.functional.avg_pool2d(mask, 8)  # nine parts of 64 patches
    assert (parts - 64 * keep).abs().max() <= 2


@pytest.mark.parametrize(
    ("keep", "count"), [(1, 576), (0.75, 420), (0.5, 288), (0.4, 225), (0.25, 144)]
)
def test_avgpool_fills_its_budget_with_a_nearly_square_grid(keep: float, count: int) -> None:
    pruner = build_pruner("avgpool", keep=keep)
    assert pruner.budget(1, 576) == count
    assert len(pruner.select(random_features(3, 576))) == 3 * count


def test_random_depends_on_seed_image_and_tile_alone() -> None:
    features = random_features(3, 576, seed=5)

    def chosen(features: VisionFeatures, seed: int = 0) -> list[list[int]]:
        kept = build_pruner("random", keep=0.25, seed=seed).select(features)
        return [kept.patch[kept.tile == t].tolist() for t in range(3)]

    first = chosen(features)
    assert chosen(cast(features, torch.float16)) == first
    assert chosen(replace(random_features(3, 576, seed=6), key=5)) == first
    assert first[0] != first[1] != first[2] != first[0]
    for other in (chosen(features, seed=1), chosen(replace(features, key=6))):
        assert all(ours != theirs for ours, theirs in zip(first, other, strict=True))


def test_random_favours_no_patch() -> None:
    features = random_features(1, 36)
    picked = torch.zeros(36)
    for seed in range(400):
        picked[build_pruner("random", keep=0.25, seed=seed).select(features).patch] += 1
    # each patch: 400 draws at 1/4, standard deviation 8.7
    assert (picked - 100).abs().max() < 40
