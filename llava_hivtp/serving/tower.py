"""vLLM's CLIP tower, tapped, and what a method keeps of its tokens."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_gather

from llava_hivtp.families.base import Picture, select_each
from llava_hivtp.pruners import Pruner
from llava_hivtp.serving.settings import room_for
from llava_hivtp.vision import KeptTokens, VisionFeatures

logger = logging.getLogger(__name__)


class Chooser:
    """Runs vLLM's CLIPVisionModel and lets a method choose among its tokens."""

    def __init__(self, pruner: Pruner, tower: nn.Module, projector: nn.Module) -> None:
        self.pruner, self.tower, self.projector = pruner, tower, projector

    def __call__(self, pictures: list[Picture], by_frame: bool = False) -> list[KeptTokens]:
        """What the method keeps of every image; the tower runs once over the tiles of all.

        Args:
            pictures: with the digest of their pixels as `key`.
            by_frame: choose among what each picture's frame shows (layout `inside`).
        """
        counts, pruner = [picture.n_tiles for picture in pictures], self.pruner
        with tapped(self.tower, pruner.layers) as (queries, keys):
            pixels = torch.cat([picture.pixels for picture in pictures])
            hidden = self.tower(pixels, feature_select_strategy="full")
        lost = _without_numbers(hidden, counts)
        if lost:
            hidden, queries, keys = _numbers(hidden), _each(queries), _each(keys)
        every = VisionFeatures(
            hidden[:, 1:], hidden[:, 0], queries, keys,
            project=self.projector, half_project=self.half_project,
        )  # fmt: skip
        chosen = select_each(pruner, every, pictures, by_frame)
        for kept, picture in zip(chosen, pictures, strict=True):
            room = room_for(pruner, every.n, picture.tile_grid, picture.frame if by_frame else None)
            if len(kept) != room:
                raise ValueError(
                    f"{type(pruner).__name__} kept {len(kept)} tokens where vLLM made room for "
                    f"{room}: a method whose count the image decides must say so in `varies_by`"
                )
        for image in lost:
            nothing = torch.zeros_like(chosen[image].tokens)
            chosen[image] = replace(chosen[image], tokens=nothing)
        return chosen

    def project(self, chosen: Sequence[KeptTokens]) -> list[Tensor]:
        """(P_i, D_lm) of every image, in one pass of the projector."""
        projected = self.projector(torch.cat([kept.tokens for kept in chosen]))
        return list(projected.split([len(kept) for kept in chosen]))

    def half_project(self, tokens: Tensor) -> Tensor:
        """The projector without its last linear layer, which reads a share in every process."""
        share, _ = self.projector.linear_1(tokens)
        return tensor_model_parallel_all_gather(self.projector.act(share))


def _without_numbers(hidden: Tensor, counts: list[int]) -> list[int]:
    """Which images came out of the tower with NaN or infinity.

    Ending the engine would end everybody's requests, and NaN in the KV cache would spoil those that
    come after: so it is logged, and the request is answered without seeing anything in the image.
    """
    sound = torch.isfinite(hidden).flatten(1).all(1).cpu()
    lost = [i for i, part in enumerate(sound.split(counts)) if not part.all()]
    for image in lost:
        logger.error(
            "Image %d of a batch of %d gives NaN or infinity in the vision tower: it is left "
            "blank, its answer is worthless. Check the checkpoint, and try another --dtype.",
            image,
            len(counts),
        )
    return lost


def _numbers(values: Tensor) -> Tensor:
    return torch.nan_to_num(values, 0.0, 0.0, 0.0)


def _each(taps: dict[int, Tensor]) -> dict[int, Tensor]:
    return {layer: _numbers(tap) for layer, tap in taps.items()}


@contextmanager
def tapped(
    tower: nn.Module, layers: Sequence[int]
) -> Iterator[tuple[dict[int, Tensor], dict[int, Tensor]]]:
    """Record queries and keys, layer -> (T, H, 1 + N, Dh), while the block is open.

    vLLM makes q, k and v in one product, and under tensor parallelism every rank those of its own
    heads. They are gathered, so that all ranks choose alike.
    """
    queries: dict[int, Tensor] = {}
    keys: dict[int, Tensor] = {}
    handles = []
    for layer in layers:
        attention = tower.vision_model.encoder.layers[layer - 1].self_attn
        hook = _recorder(queries, keys, layer, attention)
        handles.append(attention.qkv_proj.register_forward_hook(hook))
    try:
        yield queries, keys
    finally:
        for handle in handles:
            handle.remove()


def _recorder(
    queries: dict[int, Tensor], keys: dict[int, Tensor], layer: int, attention: nn.Module
) -> Callable:
    def hook(module: nn.Module, inputs: tuple, output: tuple) -> None:
        q, k, _ = output[0].detach().chunk(3, dim=-1)
        for record, part in ((queries, q), (keys, k)):
            heads = part.unflatten(-1, (attention.num_heads_per_partition, -1))
            if attention.tp_size > 1:
                heads = tensor_model_parallel_all_gather(heads.contiguous(), dim=2)
            record[layer] = heads.transpose(1, 2)

    return hook
