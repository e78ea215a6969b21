"""What every method promises, over the registry and over every row of every table."""

from __future__ import annotations

import functools
import itertools
from dataclasses import fields, replace
from pathlib import Path
from statistics import fmean

import pytest
import torch
from features import GRIDS, cast, random_features, tile_of
from torch import Tensor

from eval.plan.table import load_table
from llava_hivtp import pruners
from llava_hivtp.anyres import inside, merge_anyres
from llava_hivtp.pruners import PRUNERS, LayerPruner, Pruner, ScorePruner, build_pruner
from llava_hivtp.vision import KeptTokens, VisionFeatures

KEEP = (0.75, 0.5, 0.4, 0.25)
SETTINGS = {
    "none": [{}],
    "hivtp": [{"r": 2, "k": 50, "c": 2}, {"r": 2, "k": 14, "c": 3}, {"r": 1, "k": 25, "c": None}]
    + [{"r": 3, "k": 25, "c": 2, "fill": True}],
    "fopru": [{"keep": k} for k in KEEP] + [{"keep": k, "strategy": "row"} for k in KEEP],
    "visionzip": [{"keep": k} for k in (*KEEP, 0.01)] + [{"dominant": 30, "contextual": 0}],
    "prumerge": [{"keep": k, "adaptive": a} for k in KEEP for a in (False, True)],
    "prumerge_plus": [{"keep": k, "adaptive": a} for k in (*KEEP, 0.02) for a in (False, True)],
    "hired": [{"keep": k} for k in KEEP]
    + [{"keep": 0.4, "alpha": a, "faithful": f} for a in (0, 0.3, 1) for f in (False, True)],
    "vispruner": [{"keep": k} for k in KEEP] + [{"keep": 0.4, "important": i} for i in (0, 1)],
    "divprune": [{"keep": k} for k in KEEP],
    "hiprune": [{"keep": k} for k in KEEP] + [{"keep": 0.02, "alpha": 1}],
    "scope": [{"keep": k} for k in KEEP]
    + [{"keep": 0.4, "saliency": "received"}, {"keep": 0.1, "alpha": 0}],
    "cover": [{"keep": k} for k in KEEP]
    + [{"keep": 0.4, "importance": word} for word in ("received", "equal")]
    + [{"keep": 0.4, "reach": r} for r in (0.3, 1)],
    "holov": [{"keep": k} for k in (*KEEP, 0.02)] + [{"keep": 0.4, "crops": 7, "alpha": 2}],
    "cdpruner": [{"keep": k} for k in KEEP] + [{"keep": 0.02}],
    "random": [{"keep": k} for k in KEEP] + [{"keep": 0.4, "seed": 7}],
    "uniform": [{"keep": k} for k in KEEP],
    "avgpool": [{"keep": k} for k in KEEP],
}
MERGING = ("visionzip", "prumerge", "prumerge_plus", "avgpool")  # returns tokens it made
ACROSS_TILES = ("hired", "cdpruner")  # one budget, or one scale of relevance, for all tiles
CONFIGS = Path(__file__).parents[2] / "configs"
DEPTHS = {576: 32, 144: 4}  # layers of the language models of 7B, of the embedded one
TABLES = sorted(CONFIGS.rglob("*.yaml"))


def _cases() -> list:
    cases = []
    for name, settings in SETTINGS.items():
        for arguments in [{}, *settings]:
            spelled = ",".join(f"{key}={value}" for key, value in arguments.items())
            cases.append(pytest.param(name, arguments, id=f"{name}:{spelled}"))
    return cases


def _rows() -> list:
    rows = {}
    for path in TABLES:
        table = load_table(path)
        for row in table.rows:
            rows.setdefault((row.pruner, row.spelled, table.patches), row)
    return [pytest.param(row, key[2], id=f"{row.id}:{row.spelled}") for key, row in rows.items()]


every_setting = pytest.mark.parametrize(("name", "arguments"), _cases())
every_tiling = pytest.mark.parametrize("tiles", GRIDS)


@functools.cache
def features_of(tiles: int, patches: int = 144, seed: int = 0) -> VisionFeatures:
    return random_features(tiles, patches, seed=seed)


def same(ours: KeptTokens, theirs: KeptTokens) -> bool:
    return all(torch.equal(getattr(ours, f.name), getattr(theirs, f.name)) for f in fields(ours))


def holds_its_contract(pruner: Pruner, features: VisionFeatures) -> None:
    """Budget, order, no duplicates, aligned rows, finite tokens of the given dtype."""
    kept = pruner.select(features)
    assert kept.tokens.shape == (len(kept.tile), features.tokens.shape[2])
    assert 0 < len(kept) <= pruner.budget(features.n_tiles, features.n_patches)
    if not pruner.varies_by():
        assert len(kept) == pruner.budget(features.n_tiles, features.n_patches)
    assert len(kept.tile) == len(kept.patch)
    assert kept.tile.dtype == kept.patch.dtype == torch.int64
    assert kept.tokens.dtype == features.tokens.dtype
    assert kept.tokens.device == kept.tile.device == kept.patch.device == features.tokens.device
    assert torch.isfinite(kept.tokens).all()
    assert ((kept.tile >= 0) & (kept.tile < features.n_tiles)).all()
    assert ((kept.patch >= -1) & (kept.patch < features.n_patches)).all()
    placed = kept.patch >= 0
    position = kept.tile[placed] * features.n_patches + kept.patch[placed]
    assert (position.diff() > 0).all()  # reading order, so no patch twice


@every_tiling
@every_setting
def test_contract(name: str, arguments: dict, tiles: int) -> None:
    holds_its_contract(build_pruner(name, **arguments), features_of(tiles))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_setting
def test_contract_in_half_precision(name: str, arguments: dict, dtype: torch.dtype) -> None:
    holds_its_contract(build_pruner(name, **arguments), cast(features_of(3), dtype))


@every_tiling
@pytest.mark.parametrize(("row", "patches"), _rows())
def test_every_row_of_every_table_holds_its_contract(row, patches: int, tiles: int) -> None:
    pruner, features = row.build(), features_of(tiles, patches)
    holds_its_contract(pruner, features)
    kept = len(pruner.select(features))
    if isinstance(pruner, LayerPruner):
        kept = fmean(pruner.per_layer(kept, DEPTHS[patches]))
    assert kept <= row.block * tiles * patches / 100


def test_every_registered_method_is_tested() -> None:
    assert set(SETTINGS) == set(PRUNERS)


@every_setting
def test_twice_the_same_image_gives_the_same_tokens(name: str, arguments: dict) -> None:
    features = features_of(4)
    again = build_pruner(name, **arguments).select(features)
    assert same(build_pruner(name, **arguments).select(features), again)


@every_setting
def test_select_leaves_the_features_alone(name: str, arguments: dict) -> None:
    features = random_features(3)
    before = [features.tokens.clone(), features.cls.clone()]
    before += [x.clone() for tap in (features.queries, features.keys) for x in tap.values()]
    build_pruner(name, **arguments).select(features)
    after = [features.tokens, features.cls, *features.queries.values(), *features.keys.values()]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def _batch(images: list[VisionFeatures]) -> list[VisionFeatures]:
    """The images as views into the tensors of one pass of the tower."""

    def views(tensors: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.cat(tensors).split([len(tensor) for tensor in tensors])

    tokens = views([image.tokens for image in images])
    cls = views([image.cls for image in images])
    taps = {
        name: {
            layer: views([getattr(image, name)[layer] for image in images])
            for layer in images[0].queries
        }
        for name in ("queries", "keys")
    }
    return [
        replace(
            image,
            tokens=tokens[i],
            cls=cls[i],
            **{name: {k: v[i] for k, v in tap.items()} for name, tap in taps.items()},
        )
        for i, image in enumerate(images)
    ]


@every_setting
def test_an_image_does_not_feel_its_neighbours_in_the_batch(name: str, arguments: dict) -> None:
    images = [random_features(tiles, seed=tiles) for tiles in (3, 1, 5)]
    pruner = build_pruner(name, **arguments)
    for alone, batched in zip(images, _batch(images), strict=True):
        assert same(pruner.select(alone), pruner.select(batched))


@pytest.mark.parametrize(
    ("name", "arguments"), [case for case in _cases() if PRUNERS[case.values[0]].by_tile]
)
def test_a_method_by_tile_takes_the_tiles_of_a_batch_at_once(name: str, arguments: dict) -> None:
    images = [random_features(tiles, seed=tiles) for tiles in (3, 1, 5, 1)]
    pruner, tiles = build_pruner(name, **arguments), [image.n_tiles for image in images]
    parts = _batch(images)
    taps = {
        kind: {
            layer: torch.cat([getattr(p, kind)[layer] for p in parts]) for layer in pruner.layers
        }
        for kind in ("queries", "keys")
    }
    every = VisionFeatures(
        torch.cat([part.tokens for part in parts]), torch.cat([part.cls for part in parts]), **taps
    )
    for image, kept in zip(images, pruner.select(every).split(tiles), strict=True):
        assert same(kept, pruner.select(image))


@every_setting
def test_a_tile_does_not_feel_the_other_tiles(name: str, arguments: dict) -> None:
    if name in (*ACROSS_TILES, "random"):
        pytest.skip("shares a budget across tiles, or draws anew for each")
    features, pruner = features_of(4), build_pruner(name, **arguments)
    together = pruner.select(features)
    for tile in range(4):
        alone, mine = pruner.select(tile_of(features, tile)), together.tile == tile
        found = KeptTokens(together.tokens[mine], together.tile[mine] * 0, together.patch[mine])
        if name == "visionzip" and tile:  # dominant, CLS, contextual: from [CLS, dominant, ...]
            count = int((found.patch >= 0).sum())
            order = [count, *range(count), *range(count + 1, len(found))]
            found = KeptTokens(found.tokens[order], found.tile, found.patch[order])
        torch.testing.assert_close(found.tokens, alone.tokens)
        assert torch.equal(found.patch, alone.patch)


@every_setting
def test_a_placed_token_is_the_patch_itself(name: str, arguments: dict) -> None:
    features = features_of(5)
    kept = build_pruner(name, **arguments).select(features)
    if name not in MERGING:
        assert (kept.patch >= 0).all()
    if name != "avgpool":
        placed = kept.patch >= 0
        source = features.tokens[kept.tile[placed], kept.patch[placed]]
        assert torch.equal(kept.tokens[placed], source)


@every_setting
def test_a_centre_is_the_patch_that_others_are_added_to(name: str, arguments: dict) -> None:
    """Every token without a place has one, but for CLS or the sum of the rest, one in a tile."""
    features, pruner = features_of(1), build_pruner(name, **arguments)
    kept = pruner.select(features)
    unplaced = int((kept.patch < 0).sum())
    assert torch.equal(kept.centre[kept.patch >= 0], kept.patch[kept.patch >= 0])
    centres = kept.centre[(kept.patch < 0) & (kept.centre >= 0)]
    assert len(centres) == max(0, unplaced - 1)
    for centre in centres[:: max(1, len(centres) - 1)].tolist():
        tokens = features.tokens.clone()
        tokens[0, centre] += 1
        moved = (pruner.select(replace(features, tokens=tokens)).tokens - kept.tokens).mean(1)
        whole = torch.isclose(moved, torch.ones(()), atol=1e-5)
        assert whole.sum() == 1
        assert kept.patch[whole] == -1


@pytest.mark.parametrize("layout", ["unpad", "mosaic"])
@pytest.mark.parametrize("tiles", [3, 4, 5])
@every_setting
def test_anyres_merge_takes_what_a_method_keeps(
    name: str, arguments: dict, tiles: int, layout: str
) -> None:
    features = features_of(tiles)
    kept = build_pruner(name, **arguments).select(features)
    newline = torch.zeros(features.tokens.shape[2]) if layout == "unpad" else None
    n, (columns, rows) = features.n, features.tile_grid
    frame = (rows * n - 4 * (layout == "unpad"), columns * n)  # two rows of letterbox on each side
    image = merge_anyres(kept.tokens, kept, n, features.tile_grid, frame, newline)
    assert len(image.tokens) == image.patches + image.newlines
    left = kept.tile >= 0
    if layout == "unpad":
        row = (kept.tile - 1) // columns * n + kept.patch // n
        placed = (kept.tile > 0) & (kept.patch >= 0)
        left = ~placed | ((row >= 2) & (row < rows * n - 2))
    assert image.patches == int(left.sum())
    survivors = torch.sort(image.tokens[image.tokens.abs().sum(1) > 0], dim=0).values
    assert torch.equal(survivors, torch.sort(kept.tokens[left], dim=0).values)


@pytest.mark.parametrize("tiles", [3, 4, 5])
@every_setting
def test_inside_keeps_only_the_image_and_as_many_as_are_known_before(
    name: str, arguments: dict, tiles: int
) -> None:
    features, pruner = features_of(tiles), build_pruner(name, **arguments)
    columns, rows = features.tile_grid
    shown = inside(features.n, (columns, rows), (rows * features.n - 14, columns * features.n))
    if not pruner.chooses_inside:
        with pytest.raises(ValueError, match=r"cannot choose inside.* mosaic"):
            pruner.select_inside(features, shown)
        return
    kept = pruner.select_inside(features, shown)
    assert shown[kept.tile, kept.patch].all()
    position = kept.tile * features.n_patches + kept.patch
    assert (position.diff() > 0).all()
    assert torch.equal(kept.tokens, features.tokens[kept.tile, kept.patch])
    each = shown.sum(1).clamp(max=pruner.budget(1, features.n_patches))
    found = kept.tile.bincount(minlength=tiles)
    assert (found <= each).all() if pruner.varies_by() else torch.equal(found, each)


@pytest.mark.parametrize("name", [n for n in PRUNERS if n not in (*MERGING, "hivtp")] + ["avgpool"])
@every_tiling
def test_keeping_all_is_the_identity(name: str, tiles: int) -> None:
    features = features_of(tiles)
    assert same(PRUNERS[name]().select(features), Pruner().select(features))


@pytest.mark.parametrize("name", [n for n, cls in PRUNERS.items() if issubclass(cls, ScorePruner)])
def test_a_share_is_floored_in_every_tile(name: str) -> None:
    for keep, count in zip((*KEEP, 0.29), (432, 288, 230, 144, 167), strict=True):
        pruner = build_pruner(name, keep=keep)
        assert pruner.budget(1, 576) == count
        if name != "hired":
            assert pruner.budget(5, 576) == 5 * count


@pytest.mark.parametrize("keep", [0, -0.5, 1.5, "half", True, None])
@pytest.mark.parametrize("name", [n for n in PRUNERS if n not in ("none", "hivtp")])
def test_a_bad_share_is_refused(name: str, keep: object) -> None:
    with pytest.raises(ValueError, match="keep must be a share in"):
        build_pruner(name, keep=keep)


@pytest.mark.parametrize("name", [n for n in PRUNERS if n not in ("none", "hivtp")])
def test_a_share_that_keeps_nothing_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="keep=0.001"):
        build_pruner(name, keep=0.001).check(24, 144)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("fopru", {"strategy": "column"}, "strategy must be one of .*'column'"),
        ("visionzip", {"dominant": 54}, "give keep, or dominant and contextual"),
        ("visionzip", {"contextual": 10}, "give keep, or dominant and contextual"),
        (
            "visionzip",
            {"dominant": 54, "contextual": 10, "keep": 0.5},
            "got keep=0.5, dominant=54, contextual=10",
        ),
        ("visionzip", {"dominant": 5, "contextual": -1}, "contextual=-1"),
        ("visionzip", {"dominant": 5.0, "contextual": 1}, "whole numbers; got .* dominant=5.0"),
        ("visionzip", {"layers": (22, 23)}, "layers must be one layer"),
        ("prumerge", {"layers": (23, 24)}, "layers must be one layer"),
        ("vispruner", {"layers": ()}, "layers must be one layer"),
        ("vispruner", {"important": 1.5}, r"important must be a share in \[0, 1\], got 1.5"),
        ("hired", {"alpha": -0.1}, r"alpha must be a share in \[0, 1\], got -0.1"),
        ("hired", {"alpha": "half"}, r"alpha must be a share in \[0, 1\], got 'half'"),
        ("hired", {"layers": (23,)}, "layers must be a first and a late layer"),
        ("hiprune", {"alpha": 2}, r"alpha must be a share in \[0, 1\], got 2"),
        ("hiprune", {"layers": (9, 10, 23)}, "layers must be object layer and deep layer"),
        ("scope", {"saliency": "text"}, "saliency must be one of .*'text'"),
        ("scope", {"alpha": -1}, "alpha must be a number from 0, got -1"),
        ("scope", {"alpha": "much"}, "alpha must be a number, got 'much'"),
        ("scope", {"layers": (22, 23)}, "layers must be one layer"),
        ("holov", {"crops": 0}, "crops must be a whole number from 1, got 0"),
        ("holov", {"alpha": float("inf")}, "alpha must be a number, got inf"),
        ("holov", {"layers": ()}, "layers must be one layer"),
        ("cover", {"importance": "text"}, "importance must be one of .*'text'"),
        ("cover", {"layers": (7, 8)}, "layers must be one layer with importance=cls"),
        ("cover", {"reach": 0}, r"reach must be a share in \(0, 1\], got 0"),
        ("cover", {"reach": "most"}, r"reach must be a share in \(0, 1\], got 'most'"),
        ("cdpruner", {"question": "mine"}, "question must be one of .*'mine'"),
        ("fopru", {"ratio": 0.5}, "takes no ratio"),
    ],
)
def test_a_bad_argument_is_refused_by_name(name: str, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_pruner(name, **arguments)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("visionzip", {"dominant": 100, "contextual": 46}, "do not fit the 145 tokens of a tile"),
        ("visionzip", {"dominant": 0, "contextual": 10}, "dominant is at least 1"),
        ("prumerge", {"keep": 0.01}, "is one token; PruMerge needs"),
        ("prumerge_plus", {"keep": 0.01}, "is one token; PruMergePlus needs"),
    ],
)
def test_a_setting_that_fits_no_tile_is_refused_before_it_runs(
    name: str, arguments: dict, message: str
) -> None:
    pruner = build_pruner(name, **arguments)
    with pytest.raises(ValueError, match=message):
        pruner.check(24, 144)
    with pytest.raises(ValueError, match=message):
        pruner.select(features_of(1))


@pytest.mark.parametrize("name", ["hivtp", "fopru", "visionzip", "prumerge", "hired", "vispruner"])
def test_a_layer_that_was_not_tapped_is_named(name: str) -> None:
    with pytest.raises(ValueError, match="layer 30 was not tapped"):
        build_pruner(name, layers=(1, 30) if name == "hired" else (30,)).select(features_of(1))


@pytest.mark.parametrize("name", [n for n, cls in PRUNERS.items() if cls().layers])
def test_layers_printed_for_24_are_not_used_on_another_depth(name: str) -> None:
    pruner = PRUNERS[name]()
    pruner.check(24, 576)
    with pytest.raises(ValueError, match="this tower has 12: give layers="):
        pruner.check(12, 576)
    build_pruner(name, layers=tuple(range(1, 1 + len(pruner.layers)))).check(12, 576)


@pytest.mark.parametrize("name", [n for n, cls in PRUNERS.items() if cls().layers])
def test_a_method_reads_the_layers_it_is_given(name: str) -> None:
    features = random_features(3)
    layers = PRUNERS[name]().layers
    moved = [
        {layer + 30: x for layer, x in tap.items()} for tap in (features.queries, features.keys)
    ]
    elsewhere = replace(features, queries=moved[0], keys=moved[1])
    arguments = SETTINGS[name][1]
    pruner = build_pruner(name, **arguments, layers=tuple(layer + 30 for layer in layers))
    assert same(build_pruner(name, **arguments).select(features), pruner.select(elsewhere))


@pytest.mark.parametrize("name", [n for n, cls in PRUNERS.items() if cls().layers])
def test_a_score_that_is_not_a_number_stops_the_method(name: str) -> None:
    features = random_features(1)
    for keys in features.keys.values():
        keys[0, 0, 5, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        PRUNERS[name]().select(features)


@pytest.mark.parametrize("name", PRUNERS)
def test_only_a_seeded_method_reads_the_key(name: str) -> None:
    cls, features = PRUNERS[name], features_of(3)
    pruner = build_pruner(name, **SETTINGS[name][0])
    moved = same(pruner.select(features), pruner.select(replace(features, key=123)))
    assert moved is not cls.seeded


@pytest.mark.parametrize("name", PRUNERS)
def test_only_a_method_that_asks_reads_the_question(name: str) -> None:
    features, pruner = random_features(3), build_pruner(name, **SETTINGS[name][0])
    if not pruner.asks:
        without = replace(features, question=None)
        assert same(pruner.select(features), pruner.select(without))
        return
    other = replace(features, question=-features.question)
    assert not same(pruner.select(features), pruner.select(other))
    for nothing in (None, features.question[:0]):
        with pytest.raises(ValueError, match="by the question, and there is none"):
            pruner.select(replace(features, question=nothing))


def test_a_method_outside_the_package_works_like_any_other() -> None:
    pruner = build_pruner("external_pruner:LargestNorm", keep="0.25", power="1")
    assert pruner.power == 1
    for tiles in GRIDS:
        holds_its_contract(pruner, features_of(tiles))
    kept, features = pruner.select(features_of(1)), features_of(1)
    norms = features.tokens[0].abs().sum(1)
    assert set(kept.patch.tolist()) == set(norms.topk(36).indices.tolist())


def test_a_method_outside_the_package_may_stand_in_a_table(tmp_path: Path) -> None:
    rows = (CONFIGS / "table1.yaml").read_text()
    rows = rows.replace("pruner: uniform,", "pruner: external_pruner:LargestNorm,")
    (tmp_path / "mine.yaml").write_text(rows)
    found = [row.build() for row in load_table(tmp_path / "mine.yaml").rows if ":" in row.pruner]
    assert [pruner.keep for pruner in found] == list(KEEP)
    assert {type(pruner).__name__ for pruner in found} == {"LargestNorm"}


def test_a_method_is_named_by_its_file(tmp_path: Path) -> None:
    file = tmp_path / "my method.py"
    file.write_text((Path(__file__).parents[1] / "external_pruner.py").read_text())
    pruner = build_pruner(f"{file}:LargestNorm", keep="0.25")
    module = build_pruner("external_pruner:LargestNorm", keep="0.25")
    assert same(pruner.select(features_of(3)), module.select(features_of(3)))
    assert type(build_pruner(f"{file}:LargestNorm")) is type(pruner)
    file.with_name("broken.py").write_text("1 / 0")
    for _ in range(2):
        with pytest.raises(ValueError, match="broken.py:It' cannot be imported: ZeroDivisionError"):
            build_pruner(f"{file.with_name('broken.py')}:It")
    with pytest.raises(ValueError, match="PYTHONPATH, or name its file: path/file.py:Class"):
        build_pruner("no_such_package.methods:Mine")


@pytest.mark.parametrize(
    "spelled", ["external_pruner:LargestNorm:keep=0.25,power=1", "random:seed=3"]
)
def test_a_method_in_one_word(spelled: str) -> None:
    pruner = pruners.read_pruner(spelled)
    assert (pruner.keep, pruner.power) == (0.25, 1) if "power" in spelled else pruner.seed == 3
    assert pruners.read_pruner(spelled.rpartition(":")[0]) == type(pruner)()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("r=2,r=3", "r comes twice in 'r=2,r=3'"),
        ("k", "arguments are key=value"),
        ("k=", "arguments are key=value"),
        ("=2", "arguments are key=value"),
    ],
)
def test_arguments_of_a_command_line_are_read_or_refused(text: str, message: str) -> None:
    assert pruners.read_arguments(" r=2, layers = 7+8 ,") == {"r": "2", "layers": "7+8"}
    with pytest.raises(ValueError, match=message):
        pruners.read_arguments(text)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("hivtp", (4, 5)),
        ("fopru", (11,)),
        ("visionzip", (11,)),
        ("vispruner", (11,)),
        ("hired", (1, 11)),
        ("prumerge", (12,)),
        ("prumerge_plus", (12,)),
        ("hiprune", (5, 11)),
        ("random", ()),
    ],
)
def test_layers_of_a_paper_move_with_the_depth(name: str, layers: tuple) -> None:
    pruner = build_pruner(name)
    assert pruners.for_depth(pruner, 12).layers == layers
    pruners.for_depth(pruner, 12).check(12, 576)
    assert pruners.for_depth(pruner, 24) == pruner
    if layers:
        named = build_pruner(name, layers=layers)
        assert pruners.for_depth(named, 12) == named


def test_a_method_that_has_stages_says_so() -> None:
    assert {name for name, cls in PRUNERS.items() if cls.stage_names} == {"hivtp"}
    stages = build_pruner("hivtp").stages(torch.rand(2, 144))
    assert set(stages.unique().tolist()) == {0, *range(1, 1 + len(PRUNERS["hivtp"].stage_names))}


SWITCHES = [
    (name, field.name)
    for name, cls in PRUNERS.items()
    for field in fields(cls)
    if field.type in ("bool", bool) and not (cls.merges and field.name == "merge")
]


@pytest.mark.parametrize("value", ["no", "yes", "off", 0, 1, 1.0, None, [], [True]])
@pytest.mark.parametrize(("name", "switch"), SWITCHES)
def test_a_switch_is_true_or_false(name: str, switch: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{switch} must be true or false, got"):
        build_pruner(name, **{switch: value})
    assert getattr(build_pruner(name, **{switch: "True"}), switch) is True


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("hivtp", {"layers": (7, 7)}, r"layers must differ from one another, got \(7, 7\)"),
        ("hivtp", {"layers": "7+7"}, "layers must differ"),
        ("hivtp", {"layers": True}, "layers must be such as 7.8.9.10, got True"),
        ("hivtp", {"layers": [7, True]}, "layers must be such as"),
        ("random", {"seed": "abc"}, "seed must be a whole number, got 'abc'"),
        ("random", {"seed": True}, "seed must be a whole number, got True"),
        ("random", {"seed": 1.5}, "seed must be a whole number, got 1.5"),
        ("external_pruner:LargestNorm", {"power": "much"}, "power must be a number, got 'much'"),
        ("external_pruner:LargestNorm", {"power": float("nan")}, "power must be a number, got nan"),
        ("hired", {"alpha": True}, r"alpha must be a share in \[0, 1\], got True"),
    ],
)
def test_a_value_of_another_type_is_refused(name: str, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_pruner(name, **arguments)


@pytest.mark.parametrize("name", [[], None, 5, {"pruner": "hivtp"}])
def test_a_name_that_is_no_text_is_refused(name: object) -> None:
    with pytest.raises(TypeError, match="a pruner's name is text, got"):
        build_pruner(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("external_pruner:Missing", "cannot be imported"),
        ("no_such_module:Pruner", "cannot be imported"),
        ("external_pruner:Tensor", "is no subclass of"),
        ("largest_norm", "unknown pruner 'largest_norm'; choose from avgpool, "),
    ],
)
def test_a_wrong_name_is_explained(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_pruner(name)


def test_methods_differ() -> None:
    features = features_of(3)
    kept = {name: build_pruner(name, **SETTINGS[name][-1]).select(features) for name in PRUNERS}
    for one, other in itertools.combinations(PRUNERS, 2):
        assert len(kept[one]) != len(kept[other]) or not same(kept[one], kept[other]), (one, other)
