"""Attention received, as a Triton kernel: no attention map is ever in memory.

Row log-sum-exp first, then column sums of exp(logit - log-sum-exp): the queries and keys are read
twice, the 1 + N sums of each head are written once. Every number is added up in a fixed order
within its own tile, so the result is deterministic and independent of the other tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64  # rows and columns of a map in flight: 577 are 10 blocks, hence 160 programs per tile


def column_means(queries: Tensor, keys: Tensor) -> Tensor:
    """Mean over heads and rows of softmax(q k^T / sqrt(Dh)), (T, 1 + N) float32.

    Takes (T, H, 1 + N, Dh) queries and keys of any strides in their own dtype; logits, exponentials
    and sums are float32.
    """
    tiles, heads, length, width = queries.shape
    log_sums = queries.new_empty(tiles, heads, length, dtype=torch.float32)
    sums = torch.empty_like(log_sums)
    means = queries.new_empty(tiles, length, dtype=torch.float32)
    grid = (triton.cdiv(length, BLOCK), heads, tiles)
    sizes = {
        "heads": heads,
        "length": length,
        "width": width,
        "scale": width**-0.5,
        "PADDED": max(16, triton.next_power_of_2(width)),
        "BLOCK": BLOCK,
    }
    strides = (*queries.stride(), *keys.stride())
    with torch.cuda.device_of(queries):  # Triton launches on the current GPU, wherever tensors are
        _row_log_sums[grid](queries, keys, log_sums, *strides, **sizes)
        _column_sums[grid](queries, keys, log_sums, sums, *strides, **sizes)
        _mean_over_heads[grid[0], tiles](sums, means, heads, length, BLOCK=BLOCK)
    return means


@triton.jit
def _load(
    base,
    stride_row,
    stride_column,
    first,
    length,
    width,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(BLOCK, PADDED) rows from `first` on; zero beyond length and width."""
    rows = first + tl.arange(0, BLOCK)
    columns = tl.arange(0, PADDED)
    inside = (rows[:, None] < length) & (columns[None, :] < width)
    at = base + rows[:, None] * stride_row + columns[None, :] * stride_column
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def _row_log_sums(
    queries,
    keys,
    log_sums,
    q_tile,
    q_head,
    q_row,
    q_column,
    k_tile,
    k_head,
    k_row,
    k_column,
    heads,
    length,
    width,
    scale,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """log(sum over keys of exp(logit)) of BLOCK query rows of one head of one tile."""
    first, head, tile = tl.program_id(0) * BLOCK, tl.program_id(1), tl.program_id(2).to(tl.int64)
    queries += tile * q_tile + head * q_head
    keys += tile * k_tile + head * k_head
    q = _load(queries, q_row, q_column, first, length, width, PADDED, BLOCK)
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, length, BLOCK):
        k = _load(keys, k_row, k_column, start, length, width, PADDED, BLOCK)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        columns = start + tl.arange(0, BLOCK)
        logits = tl.where(columns[None, :] < length, logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(logits - higher[:, None]), 1)
        highest = higher
    rows = first + tl.arange(0, BLOCK)
    at = log_sums + (tile * heads + head) * length + rows
    tl.store(at, highest + tl.log(total), mask=rows < length)


@triton.jit
def _column_sums(
    queries,
    keys,
    log_sums,
    sums,
    q_tile,
    q_head,
    q_row,
    q_column,
    k_tile,
    k_head,
    k_row,
    k_column,
    heads,
    length,
    width,
    scale,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum over queries of exp(logit - log-sum-exp) of BLOCK key columns of one head of one tile."""
    first, head, tile = tl.program_id(0) * BLOCK, tl.program_id(1), tl.program_id(2).to(tl.int64)
    queries += tile * q_tile + head * q_head
    keys += tile * k_tile + head * k_head
    log_sums += (tile * heads + head) * length
    k = _load(keys, k_row, k_column, first, length, width, PADDED, BLOCK)
    received = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, length, BLOCK):
        q = _load(queries, q_row, q_column, start, length, width, PADDED, BLOCK)
        logits = tl.dot(k, tl.trans(q), input_precision="ieee") * scale  # (keys, queries)
        rows = start + tl.arange(0, BLOCK)
        shift = tl.load(log_sums + rows, mask=rows < length, other=float("inf"))
        received += tl.sum(tl.exp(logits - shift[None, :]), 1)  # a row beyond the end adds 0
    columns = first + tl.arange(0, BLOCK)
    at = sums + (tile * heads + head) * length + columns
    tl.store(at, received, mask=columns < length)


@triton.jit
def _mean_over_heads(sums, means, heads, length, BLOCK: tl.constexpr):
    """Mean over heads and rows; heads in order, whatever the number of tiles."""
    tile = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for head in range(0, heads):
        at = sums + (tile * heads + head) * length + columns
        total += tl.load(at, mask=columns < length, other=0.0)
    tl.store(means + tile * length + columns, total / (heads * length), mask=columns < length)
