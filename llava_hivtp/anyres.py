"""Kept tokens of many tiles, put together in LLaVA-NeXT's reading order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from llava.model.llava_arch import unpad_image
from torch import Tensor

from llava_hivtp.vision import KeptTokens

LAYOUTS = ("unpad", "mosaic")


@dataclass(frozen=True)
class PackedImage:
    """One image's share of the language model's input."""

    tokens: Tensor  # (L, D_lm), L = patches + newlines
    kept: KeptTokens  # what the pruner chose; under `unpad` a padding patch of it is cropped away
    patches: int  # patch, merged and CLS tokens among the L
    newlines: int  # row breaks among the L
    total: int  # patch tokens this layout passes when nothing is pruned


def merge_anyres(
    tokens: Tensor,
    kept: KeptTokens,
    n: int,
    tile_grid: tuple[int, int],
    image_size: tuple[int, int],
    newline: Tensor | None,
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
        image_size: (width, height) of the image, to crop its letterbox as LLaVA-NeXT does.
        newline: (D_lm,) put behind every row that keeps a token (layout `unpad`); None neither
            crops nor breaks rows (layout `mosaic`, the printed counts of the paper's Table 2).
    """
    columns, rows = tile_grid
    index = torch.arange(len(kept), device=tokens.device)
    tile, patch = kept.tile.to(tokens.device), kept.patch.to(tokens.device)
    placed = (tile > 0) & (patch >= 0)
    mosaic = index.new_full((rows * columns, n * n), -1)
    mosaic[tile[placed] - 1, patch[placed]] = index[placed]
    mosaic = mosaic.view(rows, columns, n, n).transpose(1, 2).reshape(rows * n, columns * n)
    if newline is not None:
        mosaic = unpad_image(mosaic[None], image_size)[0]  # LLaVA's own rounding
    total = n * n + mosaic.numel()
    if newline is not None:
        # Without a column left, LLaVA still breaks every row: pruning nothing stays identical.
        breaks = (mosaic >= 0).any(1) if mosaic.shape[1] else mosaic.new_ones(len(mosaic)).bool()
        breaks = torch.where(breaks, len(kept), -1)  # row len(kept) of the table is the newline
        mosaic = torch.cat([mosaic, breaks[:, None]], 1)
        tokens = torch.cat([tokens, newline.to(tokens)[None]])
    order = mosaic.flatten()
    loose = index[(tile > 0) & (patch < 0)]
    order = torch.cat([index[tile == 0], order[order >= 0], loose])
    newlines = int((order == len(kept)).sum())
    return PackedImage(tokens[order], kept, len(order) - newlines, newlines, total)


def merge_single(
    tokens: Tensor, kept: KeptTokens, total: int, newline: Tensor | None
) -> PackedImage:
    """Pack an image of one tile, or tiles simply behind one another (`flat` checkpoints)."""
    patches = len(tokens)
    if newline is not None and patches:
        tokens = torch.cat([tokens, newline.to(tokens)[None]])
    return PackedImage(tokens, kept, patches, len(tokens) - patches, total)
