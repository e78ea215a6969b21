"""How much attention each patch receives, from tapped queries and keys."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from llava_hivtp.vision import VisionFeatures

SCRATCH = 32 * 2**20  # bytes of attention alive at a time: flat in tiles, heads and layers


def received_attention(features: VisionFeatures, layers: Iterable[int]) -> Tensor:
    """Algorithm 1 of HIVTP (eqs. 2-4): mean attention received, (T, N) float32.

    The mean runs over `layers`, heads and all 1 + N query rows: the CLS row and a token's own
    row count, the CLS column is dropped.
    """
    layers = tuple(layers)
    received = sum(_column_means(*_tapped(features, layer)) for layer in layers)
    return received[:, 1:] / len(layers)


def cls_attention(features: VisionFeatures, layer: int) -> Tensor:
    """Attention the CLS token pays to each patch, mean over heads, (T, N) float32."""
    queries, keys = _tapped(features, layer)
    logits = queries[:, :, :1].float() @ keys.float().transpose(-1, -2)  # (T, H, 1, 1 + N)
    weights = (logits * queries.shape[-1] ** -0.5).softmax(-1)
    return weights[:, :, 0, 1:].mean(1)


def _tapped(features: VisionFeatures, layer: int) -> tuple[Tensor, Tensor]:
    if layer not in features.queries:
        raise ValueError(
            f"layer {layer} was not tapped, only {sorted(features.queries)}; "
            "name it in the pruner's `layers`"
        )
    return features.queries[layer], features.keys[layer]


def _column_means(queries: Tensor, keys: Tensor) -> Tensor:
    """Mean over heads and rows of softmax(q k^T / sqrt(Dh)), (T, 1 + N) float32."""
    tiles, heads, length, width = queries.shape
    q, k = queries.flatten(0, 1), keys.flatten(0, 1)  # (T * H, 1 + N, Dh)
    received = torch.empty(tiles * heads, length, device=q.device)
    step = max(1, SCRATCH // (4 * length * length))
    for start in range(0, tiles * heads, step):
        maps = slice(start, start + step)
        weights = torch.bmm(q[maps].float() * width**-0.5, k[maps].float().transpose(1, 2))
        received[maps] = torch.softmax(weights, -1, out=weights).mean(1)
    return received.view(tiles, heads, length).mean(1)
