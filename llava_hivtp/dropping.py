"""Drop positions between the layers of a language model while it generates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from llava_hivtp.pruners.layered import LayerPruner, LayerState, Rows
from llava_hivtp.versions import before_5

DECODERS = ("LlamaModel", "MistralModel", "Qwen2Model")  # of transformers 5, and what inherits
# Settings of `generate` by which the prompt comes in pieces, or several new tokens at once.
PIECES = (
    "assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens", "use_mtp",
    "prefill_chunk_size",
)  # fmt: skip
Look = Callable[[int], tuple[Tensor, Tensor] | None]


@dataclass(frozen=True)
class Stage:
    """What is left behind a layer, of the S positions of the prompt."""

    index: Tensor  # (B, S') rising positions, padded in front
    real: Tensor  # (B, S') bool: no padding
    ragged: bool  # some row is padded


class Dropping:
    """One call of `generate`: the prompt's pass chooses, decoding reads what each layer cached.

    Raises:
        ValueError: if the cache has no length for every layer, or the prompt comes in pieces.
    """

    def __init__(self, model: nn.Module, method: LayerPruner, look: Look) -> None:
        """Take a decoder with `layers`, `rotary_emb` and `norm`, and what tells its prompt's rows.

        Args:
            model: one of DECODERS.
            method: what to drop.
            look: number of rows -> (B, S) bool each: tokens of an image, no padding. None if no
                row has an image: then nothing is dropped.
        """
        self.model, self.method, self.look = model, method, look
        self.stages: dict[int, Stage] = {}  # layer behind which -> what is left
        self.prompt = 0  # S
        self.whole: Rows | None = None  # None while there is nothing to drop from
        self.tokens: list[int] = []  # image tokens of each row
        self.last: Tensor | None = None  # (B, 1) position of the prompt's last token
        self._inputs: dict[int, Tensor] = {}
        self._shared: dict[Any, Any] = {}  # what the layers of a stage have in common in one pass

    def enter(self, layer: int, hidden: Tensor, given: dict[str, Any]) -> tuple[Tensor, dict]:
        """What a layer, from 1, really reads instead of `hidden` and its keyword arguments."""
        if layer == 1:
            self._begin(hidden, given)
        if self.whole is None:
            return hidden, given
        prompt = hidden.shape[1] > 1
        if prompt and layer - 1 in self.method.after:
            hidden = self._drop(layer - 1, hidden, given)
        stage = self._stage(layer - 1)
        if prompt and layer in self.method.after:
            self._inputs[layer] = hidden
        if stage is not None:
            given = given | self._given(layer, stage, hidden, given)
        return hidden, given

    def mean(self, patch: Tensor) -> list[float]:
        """How many of the tokens where (B, S) `patch` holds a layer read, on average, row by row.

        B is the prompts given, not their beams.
        """
        if self.whole is None:
            return [0.0] * len(patch)
        copies = len(self.whole.real) // len(patch)
        patch, read = patch.to(self.whole.real.device), []
        for layer in range(len(self.model.layers)):
            stage = self._stage(layer)
            there = patch if stage is None else patch.gather(1, stage.index[::copies])
            real = self.whole.real if stage is None else stage.real
            read.append((there & real[::copies]).sum(1))
        return torch.stack(read).double().mean(0).tolist()

    def _begin(self, hidden: Tensor, given: dict[str, Any]) -> None:
        self._shared.clear()
        cache = given.get("past_key_values")
        if self.prompt:
            if hidden.shape[1] > 1:
                raise ValueError("a prompt in pieces cannot be dropped from; let it come at once")
            return
        if cache is not None and (not isinstance(cache, DynamicCache) or cache.get_seq_length()):
            raise ValueError(
                f"{type(cache).__name__}: dropping behind layers needs an empty DynamicCache, "
                "which has a length for every layer; let `generate` make it, and go on in one call"
            )
        self.prompt = hidden.shape[1]
        masks = self.look(len(hidden))
        if masks is None:
            return
        whole = Rows(hidden, *(mask.to(hidden.device) for mask in masks))
        self.tokens = whole.image.sum(1).tolist()
        if not whole.real[:, -1].all():
            raise ValueError(
                "a method inside the language model reads the end of every row: pad in front, with "
                "padding_side='left'"
            )
        if any(self.tokens):
            self.whole, self.last = whole, given["position_ids"][:, -1:]

    def _stage(self, layer: int) -> Stage | None:
        """The last one behind `layer` or before it."""
        behind = [after for after in self.stages if after <= layer]
        return self.stages[max(behind)] if behind else None

    def _drop(self, layer: int, hidden: Tensor, given: dict[str, Any]) -> Tensor:
        before = self._stage(layer)
        index = torch.arange(self.prompt, device=hidden.device).expand(len(hidden), -1)
        index, real = (index, self.whole.real) if before is None else (before.index, before.real)
        image = self.whole.image.gather(1, index) & real
        state = LayerState(
            hidden, image, real, layer, self.whole, index, self.model.norm,
            bias=_bias(given["attention_mask"], index),
            tapped=lambda *wanted: self._tapped(*wanted, layer, hidden, given),
        )  # fmt: skip
        counts = self.method.counts(self.tokens, layer)
        stay = self.method.stay(state, counts) & real
        self._inputs.pop(layer)
        if bool(stay.eq(real).all()):
            return hidden
        lengths = stay.sum(1)
        longest = int(lengths.max())
        order = stay.to(torch.uint8).argsort(dim=1, stable=True)[:, stay.shape[1] - longest :]
        left = stay.gather(1, order)
        self.stages[layer] = Stage(index.gather(1, order), left, bool((lengths < longest).any()))
        return _rows(hidden, order)

    def _tapped(
        self,
        wanted: int,
        projection: str,
        index: Tensor | None,
        layer: int,
        hidden: Tensor,
        given: dict[str, Any],
    ) -> Tensor:
        """Queries or keys of a layer, of the one just run from its input, made anew.

        Of the rows (B, R) `index`, by default of all.
        """
        if wanted not in (layer, layer + 1):
            raise ValueError(f"behind layer {layer} only it and the next can be read: {wanted}")
        block, stage = self.model.layers[wanted - 1], self._stage(layer - 1)
        read = hidden if wanted > layer else self._inputs[layer]
        cos, sin = given["position_embeddings"]
        if stage is not None:
            cos, sin = self._embedded(stage, hidden, given)
        if index is not None:
            read, cos, sin = (
                _rows(part.expand(len(index), -1, -1), index) for part in (read, cos, sin)
            )
        made = getattr(block.self_attn, projection)(block.input_layernorm(read))
        heads = made.unflatten(-1, (-1, block.self_attn.head_dim)).transpose(1, 2)
        heads = heads * cos[:, None] + _turned(heads) * sin[:, None]
        return heads.repeat_interleave(self.model.config.num_attention_heads // heads.shape[1], 1)

    def _given(
        self, layer: int, stage: Stage, hidden: Tensor, given: dict[str, Any]
    ) -> dict[str, Any]:
        """The keyword arguments that change for the layers of a stage, made once a pass."""
        if id(stage) not in self._shared:
            self._shared[id(stage)] = {
                "attention_mask": self._mask(stage, hidden, given),
                "position_embeddings": self._embedded(stage, hidden, given),
                "position_ids": None,  # gaps would look like several sequences in one row
            }
        return self._shared[id(stage)]

    def _embedded(
        self, stage: Stage, hidden: Tensor, given: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the positions of what a layer of the stage reads."""
        places = given["position_ids"].expand(len(hidden), -1)
        prompt = places.shape[1] == self.prompt
        if not self.method.packed:
            return self.model.rotary_emb(
                hidden, places.gather(1, stage.index) if prompt else places
            )
        counted = (stage.real.cumsum(1) - 1).clamp(min=0)
        if not prompt:  # new tokens go on behind what is left
            counted = places - self.last + counted[:, -1:]
        return self.model.rotary_emb(hidden, counted)

    def _mask(self, stage: Stage, hidden: Tensor, given: dict[str, Any]) -> Tensor | None:
        """The mask's rows and columns of what is left, or one for ragged rows that had none."""
        mask, prompt = given["attention_mask"], hidden.shape[1] > 1
        if mask is None and not stage.ragged:
            return None
        columns, real = stage.index, stage.real
        length = self.prompt if prompt else given["past_key_values"].get_seq_length()
        if not prompt:
            new = torch.arange(self.prompt, length, device=columns.device).expand(len(columns), -1)
            columns, real = torch.cat([columns, new], 1), torch.cat([real, new >= 0], 1)
        if mask is None:
            mask = self._whole(hidden, length)
        if mask.ndim == 2:  # FlashAttention's
            return mask.gather(1, columns) * real
        mask = mask.expand(len(columns), -1, -1, -1)
        if prompt:
            rows = stage.index[:, None, :, None]
            mask = mask.gather(2, rows.expand(-1, mask.shape[1], -1, mask.shape[3]))
        mask = mask.gather(3, columns[:, None, None].expand(*mask.shape[:3], -1))
        if mask.dtype == torch.bool:
            return mask & real[:, None, None]
        return mask.masked_fill(~real[:, None, None], torch.finfo(mask.dtype).min)

    def _whole(self, hidden: Tensor, length: int) -> Tensor:
        """The mask of unpadded rows, as this attention wants it."""
        kind, (rows, queries) = self.model.config._attn_implementation, hidden.shape[:2]
        queries = length if queries > 1 else 1
        if "flash" in kind:
            return hidden.new_ones(rows, length, dtype=torch.bool)
        seen = hidden.new_ones(queries, length, dtype=torch.bool).tril(length - queries)
        if kind != "eager":
            return seen[None, None]
        return hidden.new_zeros(seen.shape).masked_fill(~seen, torch.finfo(hidden.dtype).min)[
            None, None
        ]


def check_decoder(model: nn.Module, method: LayerPruner) -> None:
    """Raise a ValueError unless the method can drop behind layers of this decoder."""
    name = type(method).__name__
    if before_5():
        raise ValueError(
            f"{name} works inside the language model, which needs transformers 5; this is "
            f"{transformers.__version__}: choose a method before it"
        )
    if not any(base.__name__ in DECODERS for base in type(model).__mro__):
        raise ValueError(
            f"{name} works inside the language model; of {type(model).__name__} that is not known, "
            f"only of {', '.join(DECODERS)}"
        )
    if (window := sliding_window(model.config)) is not None:
        raise ValueError(
            f"{name} drops tokens, by which a sliding window (sliding_window={window}) would see "
            "further: choose a method before the language model"
        )
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise ValueError(
            f"{name} works inside the language model, which must lie on one device: give "
            "device_map= one"
        )
    method.check_language(len(model.layers))


def sliding_window(config: Any) -> int | None:
    """How far back some layer of a decoder sees, None where all see everything."""
    window = getattr(config, "sliding_window", None)
    some = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    return window if some or getattr(config, "use_sliding_window", True) else None


def check_generation(method: LayerPruner, given: dict[str, Any], config: Any) -> None:
    """Raise a ValueError unless `generate` reads the prompt at once, into a cache that can shrink.

    Args:
        method: what is to drop.
        given: keyword arguments of `generate`.
        config: its configuration, which they precede.
    """
    name = type(method).__name__
    for setting in PIECES:
        value = given.get(setting, getattr(config, setting, None))
        if value not in (None, False):
            raise ValueError(
                f"{name} drops from the whole prompt and decodes token by token: leave out "
                f"{setting}={value if isinstance(value, (int, str)) else type(value).__name__}"
            )
    if given.get("use_cache", config.use_cache) is False:
        raise ValueError(f"{name} needs the cache: leave out use_cache=False")
    kind = given.get("cache_implementation", config.cache_implementation)
    if kind not in (None, "dynamic"):
        raise ValueError(
            f"{name} needs a cache with a length for every layer, which cache_implementation="
            f"{kind!r} is not: leave it out"
        )


@contextmanager
def dropping(model: nn.Module, method: LayerPruner, look: Look) -> Iterator[Dropping]:
    """Let a method drop behind layers while the block is open; arguments are `Dropping`'s."""
    run = Dropping(model, method, look)
    hooks = [
        block.register_forward_pre_hook(_entrance(run, layer), with_kwargs=True)
        for layer, block in enumerate(model.layers, 1)
    ]
    try:
        yield run
    finally:
        for hook in hooks:
            hook.remove()


def _entrance(run: Dropping, layer: int) -> Callable:
    def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        hidden, kwargs = run.enter(layer, args[0], kwargs)
        return (hidden, *args[1:]), kwargs

    return enter


def _bias(mask: Tensor | None, index: Tensor) -> Tensor | None:
    """(B, S') what the prompt's last row adds for the columns `index`: it sees all, but padding."""
    if mask is None or mask.ndim == 2 or mask.dtype == torch.bool:
        return None
    return mask[:, 0, -1].expand(len(index), -1).gather(1, index)


def _rows(hidden: Tensor, index: Tensor) -> Tensor:
    """Rows (B, S') of (B, S, D)."""
    return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[2]))


def _turned(heads: Tensor) -> Tensor:
    """The half of a rotary position that goes with the sine."""
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([-second, first], -1)
