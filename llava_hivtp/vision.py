"""What goes into a pruning method and what comes out of it.

Letters: T tiles of one image, N = n * n patches per tile, D width, H heads, Dh head width,
P kept tokens. Token 0 of the encoder is CLS. Layers count from 1, as the papers print them.
Where a tower merges patches (Qwen2.5-VL: U = 4 to a token), N counts what it merges them to.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class VisionFeatures:
    """One image as the vision encoder saw it; tile 0 is the whole image."""

    tokens: Tensor  # (T, N, D) what LLaVA would project
    cls: Tensor | None  # (T, D); None where the tower has no CLS token (SigLIP)
    queries: dict[int, Tensor]  # layer -> (T, H, 1 + N, Dh), as q_proj gives them: unscaled
    keys: dict[int, Tensor]  # layer -> (T, H, 1 + N, Dh); without CLS (T, H, N, Dh) both
    project: Callable[[Tensor], Tensor] | None = None  # the projector: (..., D) -> (..., D_lm)
    key: int = 0  # digest of the pixel values: seeds a random choice whatever batch, dtype, device
    tile_grid: tuple[int, int] = (0, 0)  # (columns, rows) of tiles 1..; (0, 0) if there are none
    question: Tensor | None = None  # (Q, D_lm) embedded tokens, for a method that `asks`
    text: str = ""  # the same as text, for a method that `reads`
    grid: tuple[int, int] | None = None  # (rows, columns) of the patches; None: a square
    # The projector up to its last linear layer: (..., D) -> (..., D_h); a fifth of its arithmetic
    # where both widen to D_lm = 4 D. Where it has one linear layer the tokens are returned.
    half_project: Callable[[Tensor], Tensor] | None = None
    unit: int = 1  # U consecutive entries of queries and keys belong to one of the N

    @property
    def n_tiles(self) -> int:
        """T."""
        return self.tokens.shape[0]

    @property
    def n_patches(self) -> int:
        """N."""
        return self.tokens.shape[1]

    @property
    def n(self) -> int:
        """Side of the patch grid, where it is a square."""
        if self.grid is not None and self.grid[0] != self.grid[1]:
            raise ValueError(f"the grid of {self.grid[0]} x {self.grid[1]} patches is no square")
        return grid_side(self.n_patches)

    @property
    def sides(self) -> tuple[int, int]:
        """(rows, columns) of the patch grid."""
        return self.grid or (self.n, self.n)

    def projected(self) -> Tensor:
        """All tokens as the language model sees them, (T, N, D_lm) float32."""
        if self.project is None:
            raise ValueError("projected tokens are compared; give VisionFeatures.project")
        return self.project(self.tokens).float()

    def half_projected(self) -> Tensor:
        """All tokens as the projector's last linear layer reads them, (T, N, D_h) float32."""
        if self.half_project is None:
            raise ValueError(
                "tokens are compared halfway through the projector; give "
                "VisionFeatures.half_project"
            )
        return self.half_project(self.tokens).float()

    def split(self, tiles: list[int]) -> list[VisionFeatures]:
        """Cut the tiles of several images apart, so many of each; views, nothing is copied."""

        def cut(taps: dict[int, Tensor]) -> list[dict[int, Tensor]]:
            parts = {layer: tap.split(tiles) for layer, tap in taps.items()}
            return [{layer: part[i] for layer, part in parts.items()} for i in range(len(tiles))]

        parts = zip(
            self.tokens.split(tiles),
            [None] * len(tiles) if self.cls is None else self.cls.split(tiles),
            cut(self.queries),
            cut(self.keys),
            strict=True,
        )
        names = ("tokens", "cls", "queries", "keys")
        return [replace(self, **dict(zip(names, part, strict=True))) for part in parts]


@dataclass(frozen=True)
class KeptTokens:
    """P survivors of one image, row-aligned, in reading order.

    `tile` and `patch` may be on the host where the method had to look at them there: whoever needs
    them on the host, too, then waits for no device.
    """

    tokens: Tensor  # (P, D)
    tile: Tensor  # (P,) in [0, T)
    patch: Tensor  # (P,) in [0, N), or -1: no place in the image (CLS, merged)
    centre: Tensor | None = None  # (P,) patch into which others were merged, or `patch`
    size: Tensor | None = None  # (P,) float32, patches each token stands for; 1 if not said

    def __post_init__(self) -> None:
        if self.centre is None:
            object.__setattr__(self, "centre", self.patch)
        if self.size is None:
            ones = torch.ones(len(self), device=self.tokens.device)
            object.__setattr__(self, "size", ones)

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def split(self, tiles: list[int]) -> list[KeptTokens]:
        """Cut survivors that follow tile by tile into images of so many tiles each."""
        if len(tiles) == 1:
            return [self]
        ends = torch.tensor(tiles).cumsum(0).to(self.tile.device)
        ends = torch.searchsorted(self.tile, ends).tolist()
        counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        first, images = 0, []
        columns = (self.tokens, self.tile, self.patch, self.centre, self.size)
        parts = zip(*(column.split(counts) for column in columns), strict=True)
        for (tokens, tile, *places), own in zip(parts, tiles, strict=True):
            images.append(KeptTokens(tokens, tile - first, *places))
            first += own
        return images


class AttentionTap:
    """Records queries and keys of some encoder layers while `blocks` run.

    `blocks` are the encoder's own layers; a tapped one is a view that listens to `q_proj` and
    `k_proj`. The tower itself is only read, so taps of several threads do not see each other.
    Works under eager, SDPA and FlashAttention alike: the forward pass is left as it is.

    Raises:
        TypeError: if `tower` is not a CLIP vision encoder.
        ValueError: if a layer lies outside 1..L.
    """

    def __init__(self, tower: nn.Module, layers: Iterable[int]) -> None:
        blocks = encoder_of(tower).layers
        self.layers = tuple(sorted(set(layers)))
        check_layers(self.layers, len(blocks))
        self.queries: dict[int, Tensor] = {}
        self.keys: dict[int, Tensor] = {}
        self.blocks = list(blocks)
        for layer in self.layers:
            self.blocks[layer - 1] = self._tapped(blocks[layer - 1], layer)

    def _tapped(self, block: nn.Module, layer: int) -> nn.Module:
        attention, projections = block.self_attn, {}
        for name, record in (("q_proj", self.queries), ("k_proj", self.keys)):
            projections[name] = view_of(getattr(attention, name))
            hook = _recorder(record, layer, attention.num_heads)
            projections[name].register_forward_hook(hook)
        return view_of(block, self_attn=view_of(attention, **projections))


def encode_tiles(
    tower: nn.Module, pixels: Tensor, depth: int, layers: Iterable[int] = ()
) -> tuple[Tensor, AttentionTap]:
    """Run the encoder's first `depth` layers on (T, 3, H, W) pixels, tapping `layers`.

    Returns the (T, 1 + N, D) output of layer `depth`, equal to `hidden_states[depth]` to the bit,
    and the tap. Layer `depth + 1` may be tapped as well: only its norm and its query and key
    projections run.
    """
    tap = AttentionTap(tower, layers)
    # Leaving the tail out saves its time. A norm behind the layers is none of what LLaVA reads.
    encoder = view_of(encoder_of(tower), layers=nn.ModuleList(tap.blocks[:depth]))
    core = {"encoder": encoder, "post_layernorm": nn.Identity()}
    if hasattr(tower, "vision_model"):  # transformers 4 wraps it
        core = {"vision_model": view_of(tower.vision_model, **core)}
    hidden = view_of(tower, **core)(pixels).last_hidden_state
    if depth + 1 in tap.layers:
        block = tap.blocks[depth]
        normed = block.layer_norm1(hidden)
        block.self_attn.q_proj(normed)
        block.self_attn.k_proj(normed)
    for record in (tap.queries, tap.keys):  # a tower may be spread over devices
        record.update({layer: part.to(hidden.device) for layer, part in record.items()})
    return hidden, tap


def view_of(module: nn.Module, **children: nn.Module) -> nn.Module:
    """A module with the same weights and hooks but other children and hooks of its own to come.

    The module itself is only read.
    """
    view = module.__new__(type(module))
    # accelerate gives an instance a forward of its own, bound to that instance.
    view.__dict__.update({k: _bound_to(view, module, v) for k, v in vars(module).items()})
    view.__dict__["_modules"] = module._modules | children
    view.__dict__["_forward_hooks"] = module._forward_hooks.copy()
    return view


def without_last(layers: nn.Sequential) -> nn.Module:
    """A view of layers that hands over what the last of them would read."""
    return view_of(layers, **{str(len(layers) - 1): nn.Identity()})


def _bound_to(view: nn.Module, module: nn.Module, value: Any) -> Any:
    if isinstance(value, MethodType) and value.__self__ is module:
        return MethodType(value.__func__, view)
    if isinstance(value, partial) and any(given is module for given in value.args):
        given = (view if one is module else one for one in value.args)
        return partial(value.func, *given, **value.keywords)
    return value


def encoder_of(tower: nn.Module) -> nn.Module:
    """The stack of layers inside a `CLIPVisionModel`, transformers 4 or 5."""
    encoder = getattr(getattr(tower, "vision_model", tower), "encoder", None)
    if encoder is None or not hasattr(encoder, "layers"):
        raise TypeError(
            f"a CLIPVisionModel is needed, got {type(tower).__name__}; "
            "for a LLaVA tower pass `model.get_vision_tower().vision_tower`"
        )
    return encoder


def check_layers(layers: Iterable[int], n_layers: int) -> None:
    """Raise a ValueError unless every layer lies in 1..n_layers."""
    wrong = [layer for layer in layers if not 1 <= layer <= n_layers]
    if wrong:
        raise ValueError(
            f"layers {wrong} lie outside 1..{n_layers}; layers count from 1, as printed"
        )


def pixel_digest(tiles: Tensor) -> int:
    """The pixels (T, 3, H, W) as one number, before any cast: equal on every device, in any batch.

    It is `VisionFeatures.key`.
    """
    return zlib.crc32(tiles.float().cpu().contiguous().numpy())


def grid_side(n_patches: int) -> int:
    """Side n of the square grid of N patches."""
    n = math.isqrt(n_patches)
    if n * n != n_patches:
        raise ValueError(f"{n_patches} patches are no square grid; a CLIP tower gives n * n")
    return n


def _recorder(record: dict[int, Tensor], layer: int, heads: int) -> Callable:
    def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        record[layer] = output.detach().unflatten(-1, (heads, -1)).transpose(1, 2)

    return hook
