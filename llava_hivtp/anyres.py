"""Kept tokens of many tiles, put together in LLaVA-NeXT's reading order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from llava_hivtp.vision import KeptTokens

# Methods' own codes: VisionZip, VisPruner and HiPrune lay out as `mosaic`; HiRED unpads without
# newlines, which is none of these.
LAYOUTS = ("unpad", "inside", "mosaic")

# Places of an image's tokens in the language model: `packed` as LLaVA's splice counts what it gets,
# or `kept`, those of the unpruned sequence. There a merged token has the place of its centre; what
# has none (CLS, the sum of the rest, a centre in the letterbox) that of the token in front of it.
PLACES = ("packed", "kept")


@dataclass(frozen=True)
class PackedImage:
    """One image's share of the language model's input."""

    tokens: Tensor  # (L, D_lm), L = patches + newlines
    kept: KeptTokens  # what the pruner chose; under `unpad` a padding patch of it is cropped away
    patches: int  # patch, merged and CLS tokens among the L
    newlines: int  # row breaks among the L
    total: int  # patch tokens this layout passes when nothing is pruned
    place: Tensor  # (L,) where each would lie, had nothing been pruned; see `PLACES`
    span: int  # how long the image would be then
    is_patch: Tensor  # (L,) bool: no row break
    size: Tensor  # (L,) how many patches each stands for; a newline: 1


def merge_anyres(
    tokens: Tensor,
    kept: KeptTokens,
    n: int,
    tile_grid: tuple[int, int],
    frame: tuple[int, int],
    newline: Tensor | None,
    every_row: bool = False,
) -> PackedImage:
    """Pack projected survivors (P, D_lm) of one AnyRes image, row-aligned with `kept`.

    The base tile comes first, in the order the pruner gave. Then the survivors of the other
    tiles, row by row of the whole image. Then those of the other tiles that have no place in it
    (CLS, merged), in the order the pruner gave.

    Args:
        tokens: the projected survivors.
        kept: where they come from.
        n: side of a tile's patch grid.
        tile_grid: (columns, rows) of the sub-image tiles.
        frame: (rows, columns) of patches in the middle of the tiles that hold the image; what lies
            around, the letterbox, is cropped. Layout `mosaic` crops nothing.
        newline: (D_lm,) put behind rows; None breaks none (layout `mosaic`).
        every_row: put it behind every row of the frame (layout `inside`, where all survivors lie in
            the frame and the length is known on the host), not behind those with a token (`unpad`).
    """
    columns, rows = tile_grid
    high, wide = frame
    top, left = (rows * n - high) // 2, (columns * n - wide) // 2
    patch = kept.patch
    tile = kept.tile.to(patch.device, non_blocking=True)
    y = (tile - 1) // columns * n + kept.centre // n - top
    x = (tile - 1) % columns * n + kept.centre % n - left
    placed, inside = patch >= 0, (y >= 0) & (y < high) & (x >= 0) & (x < wide)
    # What is read later has a higher key: the base tile, the rows, the loose ones, the cropped.
    loose, cropped = 1 + high * (wide + 1), 2 + high * (wide + 1)
    key = torch.where(inside, 1 + y * (wide + 1) + x, cropped)
    key = torch.where(tile == 0, 0, torch.where(placed, key, loose))
    length = wide + (newline is not None)  # of a row
    place = torch.where(tile == 0, kept.centre, n * n + y * length + x)
    place = place.masked_fill((kept.centre < 0) | (tile > 0) & ~inside, -1)
    patches, newlines = len(kept), 0
    if newline is not None:
        row = torch.where((tile > 0) & placed & inside, y, high)
        breaks = row.new_zeros(high + 1).index_fill(0, row, 1)[:high]
        # Without a column left, LLaVA still breaks every row: pruning nothing stays identical.
        breaks = torch.ones_like(breaks) if every_row or not wide else breaks
        ends = (1 + torch.arange(high, device=row.device)) * (wide + 1)
        ends = torch.where(breaks > 0, ends, cropped)
        newlines = high
        if not every_row:  # what is cropped, which rows are left empty: the host must know
            patches, newlines = torch.stack([(key < cropped).sum(), breaks.sum()]).tolist()
        key = torch.cat([key, ends])
        tokens = torch.cat([tokens, newline.to(tokens)[None]])
        place = torch.cat([place, n * n + torch.arange(high, device=row.device) * length + wide])
    order = key.argsort(stable=True)[: patches + newlines]
    is_patch = order < len(kept)
    place = _with_the_one_in_front(place[order])
    taken = order.clamp(max=len(kept)).to(tokens.device, non_blocking=True)
    size = pad(kept.size.to(tokens.device), (0, 1), value=1.0)[taken]
    total, span = (n * n + high * each for each in (wide, length))
    return PackedImage(tokens[taken], kept, patches, newlines, total, place, span, is_patch, size)


def _with_the_one_in_front(place: Tensor) -> Tensor:
    """Places (L,), where -1 stands for that of the last token in front that has one, or 0."""
    index = torch.arange(len(place), device=place.device)
    last = torch.where(place >= 0, index, -1).cummax(0).values if len(place) else index
    return torch.where(last >= 0, place[last.clamp(min=0)], 0)


def inside(n: int, tile_grid: tuple[int, int], frame: tuple[int, int]) -> Tensor:
    """Which patches of each tile show the image and not its letterbox, (T, N) bool on the host.

    All of the base tile do.
    """
    (columns, rows), (high, wide) = tile_grid, frame
    shown = torch.zeros(rows * n, columns * n, dtype=torch.bool)
    top, left = (rows * n - high) // 2, (columns * n - wide) // 2
    shown[top : top + high, left : left + wide] = True
    tiles = shown.view(rows, n, columns, n).transpose(1, 2).reshape(-1, n * n)
    return torch.cat([tiles.new_ones(1, n * n), tiles])


def merge_single(
    tokens: Tensor, kept: KeptTokens, tiles: int, n_patches: int, newline: Tensor | None
) -> PackedImage:
    """Pack an image of one tile, or tiles simply behind one another (`flat` checkpoints)."""
    patches, total = len(tokens), tiles * n_patches
    tile = kept.tile.to(kept.centre.device, non_blocking=True)
    place = torch.where(kept.centre < 0, -1, tile * n_patches + kept.centre)
    if newline is not None and patches:
        tokens = torch.cat([tokens, newline.to(tokens)[None]])
        place = torch.cat([place, place.new_full((1,), total)])
    newlines = len(tokens) - patches
    size = pad(kept.size, (0, newlines), value=1.0)
    place = _with_the_one_in_front(place)
    span = total + (newline is not None)
    is_patch = torch.arange(len(tokens), device=place.device) < patches
    return PackedImage(tokens, kept, patches, newlines, total, place, span, is_patch, size)
