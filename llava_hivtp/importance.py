"""How much attention each patch receives, from tapped queries and keys."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Iterable

import torch
from torch import Tensor

from llava_hivtp.vision import VisionFeatures

logger = logging.getLogger(__name__)

# Bytes of attention alive at a time, whatever the tiles, heads and layers: it fits a CPU's cache,
# which makes four layers of ViT-L/14-336 a quarter faster than a whole layer at a time.
SCRATCH = 6 * 2**20
# Bytes of one head's attention alive at a time: an image may have more than 16,384 patches.
HEAD = 64 * 2**20


def received_attention(
    features: VisionFeatures, layers: Iterable[int], cls_row: bool = True
) -> Tensor:
    """Algorithm 1 of HIVTP (eqs. 2-4): mean attention received, (T, N) float32.

    The mean runs over `layers`, heads and all 1 + N query rows: the CLS row and a token's own
    row count, the CLS column is dropped. Without `cls_row` the CLS row is left out, too. A tower
    without CLS has neither; where U patches are merged to a token, theirs are averaged.
    On a GPU a Triton kernel does it without a map in memory; elsewhere
    PyTorch does, a few heads at a time.
    """
    layers = tuple(layers)
    if not layers:
        raise ValueError("layers is empty; name at least one encoder layer, such as 7 8 9 10")
    received = sum(column_means(*_tapped(features, layer)) for layer in layers)
    received = received[:, -features.n_patches * features.unit :] / len(layers)
    received = received.unflatten(1, (-1, features.unit)).mean(2)
    if cls_row or features.cls is None:
        return received
    paid = sum(cls_attention(features, layer) for layer in layers) / len(layers)
    return (received * (1 + features.n_patches) - paid) / features.n_patches


def cls_attention(features: VisionFeatures, layer: int) -> Tensor:
    """Attention the CLS token pays to each patch, mean over heads, (T, N) float32."""
    if features.cls is None:
        raise ValueError("this tower has no CLS token, whose attention the method reads")
    queries, keys = _tapped(features, layer)
    logits = queries[:, :, :1].float() @ keys.float().transpose(-1, -2)  # (T, H, 1, 1 + N)
    weights = (logits * queries.shape[-1] ** -0.5).softmax(-1)
    return weights[:, :, 0, 1:].mean(1)


def column_means(queries: Tensor, keys: Tensor) -> Tensor:
    """Mean over heads and rows of softmax(q k^T / sqrt(Dh)), (T, 1 + N) float32."""
    if kernel_runs_on(queries.device):
        from llava_hivtp import kernels

        with torch.cuda.device(queries.device):  # Triton launches on the current device
            return kernels.column_means(queries, keys)
    return column_means_in_pytorch(queries, keys)


def column_means_in_pytorch(queries: Tensor, keys: Tensor) -> Tensor:
    """The reference, and the form for devices without the kernel."""
    tiles, heads, length, width = queries.shape
    received = torch.zeros(tiles, length, device=queries.device)
    step = min(heads, max(1, SCRATCH // (4 * length * length)))
    # One scratch for all: new memory at every step costs a CPU a fifth of the product's time.
    high = max(1, min(length, HEAD // (4 * length)))
    scratch = torch.empty(step, high, length, device=queries.device)
    # One tile at a time: a tile's scores cannot depend on how many others there are.
    for tile in range(tiles):
        for start in range(0, heads, step):
            q, k = (x[tile, start : start + step].float() for x in (queries, keys))
            for rows in q.split(high, 1):
                weights = scratch[: len(q), : rows.shape[1]]  # (heads of this step, rows, 1 + N)
                # The product scales its own result: scaled queries would be new memory, too.
                scale = {"beta": 0, "alpha": width**-0.5}
                torch.baddbmm(weights, rows, k.transpose(1, 2), **scale, out=weights)
                received[tile] += torch.softmax(weights, -1, out=weights).sum((0, 1))
    return received / (heads * length)


@functools.cache
def kernel_runs_on(device: torch.device) -> bool:
    """Whether the Triton kernel can be used: a GPU that Triton supports, and Triton."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    from llava_hivtp import kernels

    probe = torch.zeros(1, 1, 2, 16, device=device)
    try:
        with torch.cuda.device(device):
            kernels.column_means(probe, probe)
    except Exception as error:  # Triton compiles at run time: without a C compiler it cannot
        logger.warning("Triton does not work here, PyTorch scores instead: %s", error)
        return False
    return True


def _tapped(features: VisionFeatures, layer: int) -> tuple[Tensor, Tensor]:
    if layer not in features.queries:
        raise ValueError(
            f"layer {layer} was not tapped, only {sorted(features.queries)}; "
            "name it in the pruner's `layers`"
        )
    return features.queries[layer], features.keys[layer]
