"""Attend to a token as to the patches it stands for: log(size) on its key, in SDPA's mask.

softmax(q k + log s) gives a token that stands for s equal ones what they would get together. The
sizes of a prompt travel with its cache, so that decoding weighs alike.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache

from llava_hivtp.dropping import DECODERS, sliding_window
from llava_hivtp.versions import before_5

ATTENTION = ("sdpa", "eager")  # which take a mask of numbers

_next = threading.local()  # decoder and sizes of the prompt that this thread reads; open calls


def check_weighing(decoder: nn.Module, method: str) -> None:
    """Raise a ValueError unless this language model can weigh its keys."""
    config = decoder.config
    attention = config._attn_implementation
    remedy = f"{method}: weigh=True"
    if before_5():
        raise ValueError(f"{remedy} needs transformers 5, this is {transformers.__version__}")
    if not any(base.__name__ in DECODERS for base in type(decoder).__mro__):
        raise ValueError(
            f"{remedy} is not supported in a {type(decoder).__name__}, only in "
            f"{', '.join(DECODERS)}: leave it out"
        )
    if attention not in ATTENTION:
        raise ValueError(
            f"{remedy} needs a mask of numbers, which {attention} does not take: use "
            "attn_implementation='sdpa'"
        )
    if (window := sliding_window(config)) is not None:
        raise ValueError(
            f"{remedy} is not supported with a sliding window (sliding_window={window}): leave it "
            "out"
        )


@contextmanager
def one_call() -> Iterator[None]:
    """Forget, around the outermost call, sizes that no cache has taken over."""
    if not getattr(_next, "depth", 0):
        _next.depth, _next.prompt = 0, None
    _next.depth += 1
    try:
        yield
    finally:
        _next.depth -= 1
        if not _next.depth:
            _next.prompt = None


def announce(decoder: nn.Module, sizes: Tensor) -> None:
    """Let the decoder weigh the keys of the prompt that this thread gives it next.

    `sizes` (B, S) are 1 for text and padding; if all are, nothing changes, to the bit. B is the
    prompts given, not their beams.
    """
    weighs = vars(decoder).get("_forward_pre_hooks", {}).values()
    if _weigh not in weighs:
        decoder.register_forward_pre_hook(_weigh, with_kwargs=True)
    _next.prompt = (decoder, sizes) if bool((sizes != 1).any()) else None


def forget(decoder: nn.Module) -> None:
    """Take the decoder's hook away again."""
    for key, hook in list(decoder._forward_pre_hooks.items()):
        if hook is _weigh:
            del decoder._forward_pre_hooks[key], decoder._forward_pre_hooks_with_kwargs[key]


def _weigh(
    decoder: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    """Before a forward pass of the decoder: its mask, with log(size) added in every column."""
    cache, sizes = kwargs.get("past_key_values"), None
    asked = getattr(_next, "prompt", None)
    if asked is not None and asked[0] is decoder:
        sizes = asked[1]
        if cache is None and _caches(decoder, kwargs):
            cache = DynamicCache(config=decoder.config)
        if cache is not None:  # without one, every pass reads the whole prompt anew
            cache.sizes, _next.prompt = sizes, None
    elif cache is not None:
        sizes = getattr(cache, "sizes", None)
    if sizes is None:
        return None
    embeds = kwargs.get("inputs_embeds")
    embeds = decoder.embed_tokens(kwargs["input_ids"]) if embeds is None else embeds
    mask = _mask(decoder, embeds, kwargs, cache)
    log = sizes.to(mask).log().repeat_interleave(len(embeds) // len(sizes), 0)
    columns = mask.shape[-1]
    log = pad(log[:, :columns], (0, max(0, columns - log.shape[1])))
    new = {"input_ids": None, "inputs_embeds": embeds, "past_key_values": cache}
    return args, kwargs | new | {"attention_mask": mask + log[:, None, None]}


def _caches(decoder: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether the decoder would make itself a cache."""
    use = kwargs.get("use_cache")
    return not decoder.training and bool(decoder.config.use_cache if use is None else use)


def _mask(decoder: nn.Module, embeds: Tensor, kwargs: dict[str, Any], cache: Any) -> Tensor:
    """The decoder's own mask (B, 1, Q, K) as numbers to add."""
    from transformers.masking_utils import create_causal_mask  # not in transformers 4

    mask = create_causal_mask(
        decoder.config, embeds, kwargs.get("attention_mask"), cache,
        kwargs.get("position_ids"), allow_is_causal_skip=False,
    )  # fmt: skip
    if mask.dtype != torch.bool:
        return mask
    least = torch.finfo(embeds.dtype).min
    return torch.zeros(mask.shape, dtype=embeds.dtype, device=mask.device).masked_fill(~mask, least)
