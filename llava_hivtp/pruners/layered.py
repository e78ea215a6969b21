"""What a method inside the language model is: it says which positions stay behind some layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llava_hivtp.pruners.base import Pruner, check_layers, check_share, finite, share
from llava_hivtp.vision import KeptTokens, VisionFeatures

# What such a method says as its encoder method does.
ENCODERS = (
    "seeded",
    "asks",
    "reads",
    "question",
    "needs_cls",
    "needs_square",
    "chooses_inside",
    "merges",
)


@dataclass(frozen=True)
class Rows:
    """S positions of B rows of the language model, padded in front."""

    hidden: Tensor  # (B, S, D)
    image: Tensor  # (B, S) bool: tokens of an image, its newlines included
    real: Tensor  # (B, S) bool: no padding

    @property
    def asking(self) -> Tensor:
        """(B, S) bool: text behind the first image."""
        return self.real & ~self.image & (self.image.cumsum(1) > 0)


@dataclass(frozen=True)
class LayerState(Rows):
    """What a method may read where it chooses: what is left of the prompt behind a layer.

    In decoding nothing is chosen.
    """

    layer: int  # behind which, from 1
    prompt: Rows  # what the first layer read
    index: Tensor  # (B, S) where in the prompt each position was
    norm: nn.Module  # the norm behind the last layer
    bias: Tensor | None  # (B, S) what attention adds to the logits of a key, such as log(size)
    tapped: Callable[[int, str, Tensor | None], Tensor]  # see `queries` and `keys`

    def queries(self, layer: int, index: Tensor) -> Tensor:
        """(B, H, R, Dh) queries with their positions, of the rows (B, R) `index`.

        Like `keys` of this layer or of the next.
        """
        return self.tapped(layer, "q_proj", index)

    def keys(self, layer: int) -> Tensor:
        """(B, H, S, Dh) keys with their positions, one for every query head."""
        return self.tapped(layer, "k_proj", None)

    @property
    def last(self) -> Tensor:
        """(B, S) bool: the last position of every row, which speaks next."""
        last = torch.zeros_like(self.real)
        last[:, -1] = True
        return last

    def attention(self, rows: Tensor, layer: int) -> Tensor:
        """Attention that (B, S) `rows` pay to every position, (B, R, S) float32, mean over heads.

        R is the number of rows of the batch item that has most; others come first, with zeros.
        """
        count = int(rows.sum(1).max())
        order = rows.to(torch.uint8).argsort(dim=1, stable=True)[:, rows.shape[1] - count :]
        queries, keys = self.queries(layer, order), self.keys(layer)
        logits = queries.float() @ keys.float().transpose(2, 3) * queries.shape[3] ** -0.5
        if self.bias is not None:
            logits = logits + self.bias[:, None, None].float()
        place = torch.arange(rows.shape[1], device=rows.device)
        seen = self.real[:, None] & (place <= order[:, :, None])  # (B, R, S)
        weights = logits.masked_fill(~seen[:, None], -torch.inf).softmax(3).mean(1)
        return torch.where(rows.gather(1, order)[..., None], weights, 0)


def _encoders(name: str) -> property:
    """What the encoder method says of itself, whichever is set by now."""
    return property(lambda self: getattr(self.encoder, name))


@dataclass
class LayerPruner(Pruner):
    """Drop image tokens behind some layers of the language model; a subclass gives `score`.

    What enters the language model is chosen by `encoder`, any other method. Text always stays.
    """

    # the encoder method's, as it is when this one is built and when it is checked
    layers: tuple[int, ...] = field(default=(), init=False)
    merge: bool = field(default=False, init=False)
    weigh: bool = field(default=False, init=False)
    after: tuple[int, ...] = ()  # layers behind which tokens are dropped, from 1
    keep: tuple[float, ...] = ()  # shares of the image tokens that entered, one behind each
    packed: bool = False  # positions of what stays are counted anew; else each keeps its own
    encoder: Pruner = field(default_factory=Pruner)  # or its text, such as hivtp:r=2:k=25

    seeded, asks, reads, question, needs_cls, needs_square, chooses_inside, merges = map(
        _encoders, ENCODERS
    )

    def __post_init__(self) -> None:
        if not isinstance(self.keep, tuple):
            self.keep = (self.keep,) * len(self.after)
        super().__post_init__()
        self._take_over()

    def validate(self) -> None:
        """Also that every layer of `after` has a share."""
        super().validate()
        if not isinstance(self.encoder, Pruner) or isinstance(self.encoder, LayerPruner):
            raise ValueError(
                f"encoder must be a method before the language model: {self.encoder!r}"
            )
        self.encoder.validate()
        check_layers(self.after)
        for value in self.keep:
            check_share("keep", value)
        rising = list(self.after) == sorted(self.after)
        if not self.after or not rising or len(self.keep) != len(self.after):
            raise ValueError(
                f"after must be rising layers, each with a share in keep; got after={self.after}, "
                f"keep={self.keep}"
            )
        if list(self.keep) != sorted(self.keep, reverse=True):
            raise ValueError(f"what is gone does not come back: keep must fall, got {self.keep}")

    def select(self, features: VisionFeatures) -> KeptTokens:
        """What enters the language model: the encoder method's choice."""
        return self.encoder.select(features)

    def select_inside(self, features: VisionFeatures, inside: Tensor) -> KeptTokens:
        """The encoder method's."""
        return self.encoder.select_inside(features, inside)

    def budget(self, n_tiles: int, n_patches: int) -> int:
        """Most tokens that enter the language model; `per_layer` says what its layers read."""
        return self.encoder.budget(n_tiles, n_patches)

    def budget_on(self, grid: tuple[int, int]) -> int:
        """The encoder method's."""
        return self.encoder.budget_on(grid)

    def per_layer(self, tokens: int, depth: int) -> list[int]:
        """Tokens that each of `depth` layers reads of those that entered."""
        self.check_language(depth)
        behind = {layer: self.counts([tokens], layer)[0] for layer in self.after}
        read = [tokens]
        for layer in range(1, depth):
            read.append(behind.get(layer, read[-1]))
        return read

    def _take_over(self) -> None:
        for name in ("layers", "merge", "weigh"):
            setattr(self, name, getattr(self.encoder, name))

    def varies_by(self) -> str:
        """The encoder method's."""
        return self.encoder.varies_by()

    def check(self, n_layers: int, n_patches: int | None) -> None:
        """Also that the encoder method fits, and that of what it keeps any stays."""
        self.validate()
        self.encoder.check(n_layers, n_patches)
        self._take_over()
        if n_patches is not None:
            share(min(self.keep), self.budget(1, n_patches))

    def check_language(self, n_layers: int) -> None:
        """Raise a ValueError unless the method fits a language model of this depth."""
        wrong = [layer for layer in self.after if not 1 <= layer < n_layers]
        if wrong:
            raise ValueError(
                f"{type(self).__name__}: layers {wrong} lie outside 1..{n_layers - 1}: behind the "
                f"last of {n_layers} nothing is left to save; give after="
            )

    def score(self, state: LayerState) -> Tensor:
        """Importance of every position, (B, S) float32; of image tokens the highest stay."""
        raise TypeError(f"{type(self).__name__} must define score(state)")

    def stay(self, state: LayerState, counts: list[int]) -> Tensor:
        """Which positions stay, (B, S) bool: all text, and `counts` image tokens of each row."""
        text = state.real & ~state.image
        return best_of_image(finite(self.score(state)), state.image, counts) | text

    def counts(self, tokens: list[int], layer: int) -> list[int]:
        """floor(keep * V) of the V image tokens that each row brought into the language model."""
        part = self.keep[self.after.index(layer)]
        return [share(part, count) if count else 0 for count in tokens]


def best_of_image(scores: Tensor, image: Tensor, counts: list[int]) -> Tensor:
    """(B, S) bool: the so many best-scored image tokens a row; ties go to the lowest position."""
    order = scores.masked_fill(~image, -torch.inf).argsort(dim=1, descending=True, stable=True)
    most = torch.tensor(counts, device=scores.device)[:, None]
    within = torch.arange(scores.shape[1], device=scores.device) < most
    return torch.zeros_like(image).scatter(1, order, within)
