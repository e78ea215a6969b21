"""Requests whose work is recorded once and replayed: CUDA graphs of tower, prefill and decoding.

At batch 1 a fast GPU waits for Python to launch its kernels, and that hides what pruning saves.
A graph launches all at once, but needs fixed shapes: prompts are padded to a multiple of BUCKET
and a static cache has room for the answer. Pruned and unpruned requests go the same way. On a CPU
everything is the same but the recording.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import pad

from eval.efficiency.stopwatch import Stopwatch
from llava_hivtp.vision import encoder_of

BUCKET = 16  # a ragged method then needs one or two graphs; padding costs 2 % of a short prompt

# Does some work and gives back what does it again, in the same memory.
Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]


class Recorded:
    """A function of tensors, replayed as a CUDA graph for every shape of its arguments.

    The next call overwrites what a call returned.
    """

    def __init__(
        self, function: Callable[..., Tensor], capture: Capture | None, state: Sequence[Tensor] = ()
    ) -> None:
        self._function, self._capture = function, capture
        self._state = state  # what the function changes, besides what it overwrites
        self._replays: dict[tuple, tuple[list[Tensor], Callable[[], Tensor]]] = {}

    def __call__(self, *given: Tensor) -> Tensor:
        """The function of these tensors; recorded if their shapes are new."""
        key = tuple((tensor.shape, tensor.dtype) for tensor in given)
        if key not in self._replays:
            inputs = [tensor.clone() for tensor in given]
            self._replays[key] = inputs, self._record(partial(self._function, *inputs))
        inputs, replay = self._replays[key]
        for mine, theirs in zip(inputs, given, strict=True):
            mine.copy_(theirs)
        return replay()

    def _record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        if self._capture is None:
            return run
        before = [tensor.clone() for tensor in self._state]
        replay = self._capture(run)
        for tensor, value in zip(self._state, before, strict=True):
            tensor.copy_(value)
        return replay


def _cuda_graph(pool: Any, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Run, then record: the call that comes back repeats the GPU's work alone."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # libraries pick their kernels and take their memory before the recording
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        output = run()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


class Graphs:
    """Recordings of one model, whatever prunes it; by default CUDA graphs where there is CUDA."""

    def __init__(self, model: Any, capture: Capture | None = None) -> None:
        if getattr(model, "chat", None) is not None:
            raise ValueError("--graphs records official LLaVA only: leave it out")
        if not hasattr(transformers, "StaticCache"):
            raise ValueError("--graphs needs the static cache of transformers 5")
        if model.config._attn_implementation != "sdpa":
            raise ValueError("--graphs needs --attention sdpa: its mask is one of padded slots")
        if getattr(model.config, "sliding_window", None):
            raise ValueError("--graphs: sliding-window attention is not supported")
        self.model = model
        if capture is None and model.device.type == "cuda":
            # Graphs that share a pool run one after another, as these do.
            capture = partial(_cuda_graph, torch.cuda.graph_pool_handle())
        self._capture = capture
        self._layers: list[tuple[nn.Module, Recorded]] = []
        for layer in encoder_of(model.get_vision_tower().vision_tower).layers:
            alone = partial(layer.forward, attention_mask=None)
            self._layers.append((layer, Recorded(alone, capture)))
        self._languages: dict[tuple[int, int], _Language] = {}

    def generate(
        self, prompt: Tensor, given: dict[str, Any], new_tokens: int, stopwatch: Stopwatch
    ) -> Tensor:
        """Greedy answers, (B, new_tokens); equal to those of `model.generate`."""
        model = self.model
        with self._tower_replayed():
            _, _, mask, _, embeds, _ = model.prepare_inputs_labels_for_multimodal(
                prompt, None, None, None, None, given["images"], given["image_sizes"]
            )
        batch, length = embeds.shape[:2]
        more = -length % BUCKET
        language = self._language(batch, length + more + new_tokens)
        stopwatch.length = length
        stopwatch.mark("splice")
        if mask is None or mask.all():  # no row is shorter: what is added can go behind
            padding = prompt.new_zeros(batch)
            token = language.start(pad(embeds, (0, 0, 0, more)), prompt.new_full((1,), length - 1))
        else:
            padding = more + (~mask).sum(1)  # in front of every row
            torch._foreach_zero_(language.filled)
            token = language.go_on(pad(embeds, (0, 0, more, 0)), padding)
        stopwatch.mark("prefill")
        answers = []
        for step in range(new_tokens):
            if step:
                token = language.go_on(token, padding)
            answers.append(token.cpu())
            stopwatch.put(token)
        return torch.cat(answers, 1)

    def _language(self, batch: int, room: int) -> _Language:
        if (batch, room) not in self._languages:
            self._languages[batch, room] = _Language(self.model, batch, room, self._capture)
        return self._languages[batch, room]

    @contextmanager
    def _tower_replayed(self) -> Iterator[None]:
        """The tower's layers replayed, but for those whose queries or keys somebody listens to."""
        for layer, recorded in self._layers:
            layer.forward = partial(_replay_unheard, layer, recorded)
        try:
            yield
        finally:
            for layer, _ in self._layers:
                del layer.forward


def _replay_unheard(
    layer: nn.Module, recorded: Recorded, hidden: Tensor, *rest: Any, **options: Any
) -> Tensor:
    attention = layer.self_attn
    if attention.q_proj._forward_hooks or attention.k_proj._forward_hooks:
        return type(layer).forward(layer, hidden, *rest, **options)
    return recorded(hidden)


class _Language:
    """The language model with a static cache of `room` positions for each row of a batch."""

    def __init__(self, model: Any, batch: int, room: int, capture: Capture | None) -> None:
        config = model.config
        width = config.hidden_size // config.num_attention_heads
        shape = (batch, config.num_key_value_heads, width)
        self._model, self._room = model, room
        self._cache = transformers.StaticCache(config=config, max_cache_len=room)
        self._cache.early_initialization(*shape, model.dtype, model.device)
        self.filled = [layer.cumulative_length for layer in self._cache.layers]
        self.start = Recorded(self._start, capture)
        self.go_on = Recorded(self._go_on, capture, self.filled)

    def _start(self, embeds: Tensor, last: Tensor) -> Tensor:
        """The token (B, 1) behind position `last` of (B, S, D); what stands behind is padding.

        Causal attention needs no mask then, and computes half the square.
        """
        cache = transformers.DynamicCache()
        hidden = self._model.get_model()(
            inputs_embeds=embeds, past_key_values=cache, use_cache=True
        ).last_hidden_state
        for own, new in zip(self._cache.layers, cache.layers, strict=True):
            own.keys[:, :, : embeds.shape[1]] = new.keys
            own.values[:, :, : embeds.shape[1]] = new.values
            own.cumulative_length.copy_((last + 1).view_as(own.cumulative_length))
        # All logits, as LLaVA asks for them.
        return self._model.lm_head(hidden).index_select(1, last).argmax(-1)

    def _go_on(self, given: Tensor, padding: Tensor) -> Tensor:
        """The token (B, 1) that follows embeddings (B, S, D) or tokens (B, S)."""
        start = self.filled[0]
        rows = (start + torch.arange(given.shape[1], device=given.device))[:, None]
        slots = torch.arange(self._room, device=given.device)
        seen = (slots <= rows) & (slots >= padding[:, None, None])  # (B, S, room)
        seen = seen | (slots == rows)  # padding sees itself: a row that sees nothing would be NaN
        output = self._model.get_model()(
            **{"inputs_embeds" if given.is_floating_point() else "input_ids": given},
            attention_mask=seen[:, None],
            position_ids=(rows[:, 0] - padding[:, None]).clamp(min=0),
            past_key_values=self._cache,
            use_cache=True,
        )
        return self._model.lm_head(output.last_hidden_state)[:, -1:].argmax(-1)
