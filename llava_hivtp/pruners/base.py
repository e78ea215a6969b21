"""What a pruning method is: a dataclass that selects tokens of one image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from llava_hivtp.vision import KeptTokens, VisionFeatures

_KINDS = {  # annotation of a field -> whether a value is one, what it must be
    "bool": (lambda value: isinstance(value, bool), "true or false"),
    "int": (lambda value: type(value) is int, "a whole number"),
    "float": (
        lambda value: (
            isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        ),
        "a number",
    ),
    "str": (lambda value: isinstance(value, str), "a word"),
}


class PaperLayers(tuple):
    """Layers as a paper prints them for 24 encoder layers; another depth must name its own."""

    depth = 24

    def at(self, depth: int, among: tuple[int, ...] = ()) -> tuple[int, ...]:
        """The same layers of an encoder of another depth.

        The last three keep their distance from the end, the others their share of the depth,
        rounded up; of two that meet one is left: 7-10 of 24 are 4 and 5 of 12. If only layers
        `among` will do, the nearest of them, of two the lower: 7-10 are 8 and 16 of 8, 16, 24, 32.
        """
        if depth == self.depth and not among:
            return self
        ends = self.depth - 3
        moved = (
            depth - self.depth + layer if layer > ends else math.ceil(layer * depth / self.depth)
            for layer in self
        )
        found = [max(1, layer) for layer in moved]
        if among:
            found = [min(among, key=lambda own, to=layer: abs(own - to)) for layer in found]
        return tuple(dict.fromkeys(found))


@dataclass
class Pruner:
    """Keep every token: the unpruned model, and the base of every method.

    The fields are the hyper-parameters, the keys in a table's YAML and the model_args.
    """

    layers: tuple[int, ...] = ()  # encoder layers whose queries and keys `select` reads, from 1
    merge: bool = False  # average what is dropped into the token of its tile that is most like it
    weigh: bool = False  # attend to a token as to the patches it stands for: log(size) on its key

    # What a method calls the steps in which it keeps a patch, in order; () if it has no steps. One
    # that names them has `stages(scores)`: the step that keeps each patch, from 1, or 0 for none.
    stage_names: ClassVar[tuple[str, ...]] = ()
    # How many tokens stay varies around a mean that was measured on other images. `budget` is the
    # most for one image all the same; tables show such a method apart.
    calibrated: ClassVar[bool] = False
    seeded: ClassVar[bool] = False  # reads `VisionFeatures.key`
    asks: ClassVar[bool] = False  # reads `VisionFeatures.question`
    reads: ClassVar[bool] = False  # reads `VisionFeatures.text` as well
    question: ClassVar[str] = "own"  # or "other": it shall not be the prompt's own
    needs_cls: ClassVar[bool] = False  # reads the CLS token or its attention: CLIP has one
    needs_square: ClassVar[bool] = False  # works on n x n patches only
    merges: ClassVar[bool] = False  # merges by itself, so that `merge` has nothing left to do
    # Chooses in every tile as if it were alone, to the bit, from tokens, queries and keys only, and
    # returns tile by tile: then all tiles of a batch come in at once.
    by_tile: ClassVar[bool] = False

    def __init_subclass__(cls, **options: object) -> None:
        """Every class says for itself whether it is `by_tile`: it may choose otherwise."""
        super().__init_subclass__(**options)
        if "by_tile" not in vars(cls):
            cls.by_tile = False

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raise a ValueError unless every field is what its annotation says.

        Called when the method is built, when it is attached and before it runs.
        """
        name = type(self).__name__
        for field in fields(self):
            kind = getattr(field.type, "__name__", field.type)
            if kind in _KINDS and not _KINDS[kind][0](value := getattr(self, field.name)):
                raise ValueError(f"{name}: {field.name} must be {_KINDS[kind][1]}, got {value!r}")
        if self.merge and self.merges:
            raise ValueError(f"{name} merges what it drops by itself: leave out merge=True")
        check_layers(self.layers)

    def select(self, features: VisionFeatures) -> KeptTokens:
        """Choose the tokens of one image that reach the language model."""
        every = torch.arange(features.n_patches, device=features.tokens.device)
        return keep_indices(features, every.expand(features.n_tiles, -1))

    @property
    def chooses_inside(self) -> bool:
        """Whether it has `select_inside`; subclasses say so with a class attribute."""
        return type(self) is Pruner

    def select_inside(self, features: VisionFeatures, inside: Tensor) -> KeptTokens:
        """`select` among the patches where `inside`, (T, N) bool on the host, holds: layout inside.

        A tile keeps min(its budget, patches inside), so their number is known on the host.

        Raises:
            ValueError: if the method cannot leave patches out.
        """
        if not self.chooses_inside:
            raise ValueError(
                f"{type(self).__name__} cannot choose inside the image only: use layout unpad or "
                "mosaic"
            )
        return keep_mask(features, inside)

    def budget(self, n_tiles: int, n_patches: int) -> int:
        """Most tokens `select` may return for an image of n_tiles tiles of n_patches patches.

        A promise: the model refuses a choice of more.
        """
        return n_tiles * n_patches

    def budget_on(self, grid: tuple[int, int]) -> int:
        """`budget` for one tile of (rows, columns) patches, which may differ."""
        return self.budget(1, grid[0] * grid[1])

    def per_layer(self, tokens: int, depth: int) -> list[int]:
        """Tokens that each of the language model's `depth` layers reads of those that entered."""
        return [tokens] * depth

    def varies_by(self) -> str:
        """The setting, such as "fill=False", by which an image decides how many tokens stay.

        "" where `select` always returns exactly `budget` tokens.
        """
        return ""

    def check(self, n_layers: int, n_patches: int | None) -> None:
        """Raise a ValueError unless the method fits an encoder of this depth and grid.

        `n_patches` is None where every image has a grid of its own.
        """
        name = type(self).__name__
        self.validate()
        if type(self).layers and not self.layers:
            raise ValueError(f"{name}: layers is empty; name at least one encoder layer")
        if isinstance(self.layers, PaperLayers) and n_layers != PaperLayers.depth:
            raise ValueError(
                f"{name}: the default layers {tuple(self.layers)} are the paper's, for "
                f"{PaperLayers.depth} encoder layers; this tower has {n_layers}: give layers=, or "
                "move them with llava_hivtp.pruners.for_depth"
            )
        wrong = [layer for layer in self.layers if not 1 <= layer <= n_layers]
        if wrong:
            raise ValueError(f"{name}: layers {wrong} lie outside 1..{n_layers}")
        if n_patches is not None:
            self.budget(1, n_patches)


@dataclass
class ScorePruner(Pruner):
    """Keep the best-scored share of every tile; a subclass gives `score`."""

    keep: float = 1.0  # share of the N patches of a tile, in (0, 1]

    def validate(self) -> None:
        """Also that `keep` is a share."""
        check_share("keep", self.keep)
        super().validate()

    def score(self, features: VisionFeatures) -> Tensor:
        """Importance of every patch, (T, N) float32; higher stays."""
        raise TypeError(f"{type(self).__name__} must define score(features)")

    def select(self, features: VisionFeatures) -> KeptTokens:
        """Keep the floor(keep * N) best patches per tile; ties go to the lowest index."""
        scores = finite(self.score(features))
        return keep_indices(features, best(scores, share(self.keep, features.n_patches)))

    def select_inside(self, features: VisionFeatures, inside: Tensor) -> KeptTokens:
        """Keep the best patches inside; needs a score that orders also those not kept."""
        if not self.chooses_inside:
            return super().select_inside(features, inside)
        scores = finite(self.score(features))
        return keep_inside(features, scores, inside, self.budget(1, features.n_patches))

    def budget(self, n_tiles: int, n_patches: int) -> int:
        """floor(keep * N) in every tile."""
        return n_tiles * share(self.keep, n_patches)


QUESTIONS = ("own", "other")


@dataclass
class QuestionPruner(ScorePruner):
    """A `ScorePruner` whose `score` reads the question, (Q, D_lm) `features.question`."""

    question: str = "own"  # or "other", a control: that of another prompt, which the caller gives

    asks: ClassVar[bool] = True

    def validate(self) -> None:
        """Also that `question` is one of QUESTIONS."""
        super().validate()
        if self.question not in QUESTIONS:
            raise ValueError(f"question must be one of {QUESTIONS}, got {self.question!r}")

    def select(self, features: VisionFeatures) -> KeptTokens:
        """As every `ScorePruner`, if there is a question."""
        if features.question is None or not len(features.question):
            raise ValueError(
                f"{type(self).__name__} chooses by the question, and there is none: "
                "give VisionFeatures.question"
            )
        return super().select(features)


def check_budget(
    pruner: Pruner,
    chosen: Sequence[KeptTokens],
    tiles: Sequence[int],
    n_patches: int,
    first: int = 0,
    grid: tuple[int, int] | None = None,
) -> None:
    """Raise a ValueError naming method and image if more tokens were chosen than `budget` says.

    Images count from `first`. With a `grid` of (rows, columns) `budget_on` says it.
    """
    for i, (kept, n_tiles) in enumerate(zip(chosen, tiles, strict=True), first):
        most = n_tiles * pruner.budget_on(grid) if grid else pruner.budget(n_tiles, n_patches)
        if len(kept) > most:
            raise ValueError(
                f"{type(pruner).__name__} kept {len(kept)} tokens of image {i} ({n_tiles} tiles of "
                f"{n_patches} patches), more than its budget of {most}"
            )


def check_share(name: str, value: float) -> None:
    """Raise a ValueError unless value is a number in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ValueError(f"{name} must be a share in (0, 1], got {value!r}")


def check_part(name: str, value: float) -> None:
    """Raise a ValueError unless value is a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a share in [0, 1], got {value!r}")


def check_layers(layers: object, count: int | None = None, what: str = "") -> None:
    """Raise a ValueError unless layers is a tuple of whole numbers, `count` of them if given."""
    if not isinstance(layers, tuple) or any(type(layer) is not int for layer in layers):
        raise ValueError(f"layers must be a tuple of whole numbers, got {layers!r}")
    if len(set(layers)) < len(layers):
        raise ValueError(f"layers must differ from one another, got {layers}")
    if count is not None and len(layers) != count:
        raise ValueError(f"layers must be {what}, got {layers}")


def share(keep: float, n_patches: int) -> int:
    """floor(keep * N), exact in decimals: 0.29 of 100 is 29, not 28."""
    kept = int(Fraction(str(keep)) * n_patches)
    if kept < 1:
        raise ValueError(
            f"keep={keep} of {n_patches} patches keeps no token; "
            f"the least share is {math.ceil(1e6 / n_patches) / 1e6:g}"
        )
    return kept


def best(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest scores per row, ascending; ties go to the lowest index."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return order[..., :count].sort(-1).values


def finite(scores: Tensor) -> Tensor:
    """Return the scores; a NaN would order them arbitrarily, so it raises a ValueError."""
    if not torch.isfinite(scores).all():
        raise ValueError("the scores hold NaN or infinity; check the image and the checkpoint")
    return scores


def keep_indices(features: VisionFeatures, patch: Tensor) -> KeptTokens:
    """Tokens at (T, K) patch indices: equally many per tile, so nothing waits for the device."""
    tiles, count = patch.shape
    tokens = features.tokens[torch.arange(tiles, device=patch.device)[:, None], patch]
    return KeptTokens(
        tokens.flatten(0, 1), torch.arange(tiles).repeat_interleave(count), patch.flatten()
    )


def keep_inside(features: VisionFeatures, scores: Tensor, inside: Tensor, most: int) -> KeptTokens:
    """The min(most, patches inside) best of (T, N) scores in every tile, in raster order.

    `inside` is on the host, so nothing waits for the device. Ties go to the lowest index.
    """
    taken = torch.arange(features.n_patches) < inside.sum(1, keepdim=True).clamp(max=most)
    tile, rank = taken.nonzero().T.contiguous()
    shown, taken = inside.to(scores.device), taken.to(scores.device)
    order = scores.masked_fill(~shown, -torch.inf).argsort(dim=1, descending=True, stable=True)
    order = order.masked_fill(~taken, features.n_patches).sort(1).values
    there = tile.to(scores.device)
    patch = order[there, rank.to(scores.device)]
    return KeptTokens(features.tokens[there, patch], tile, patch)


def keep_mask(features: VisionFeatures, mask: Tensor) -> KeptTokens:
    """Tokens where a (T, N) mask holds, tile by tile in raster order.

    How many they are must be known on the host: a mask on a GPU is brought there, once.
    """
    place = mask.cpu().nonzero().T.contiguous()
    tile, patch = place.to(features.tokens.device, non_blocking=True)
    return KeptTokens(features.tokens[tile, patch], *place)
