"""When a request passes from stage to stage: hooks on the model, a streamer for the tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from eval.clock import Clock

STAGES = ("tower", "select", "project", "splice", "prefill", "first")


@dataclass(frozen=True)
class Run:
    """Seconds of one request."""

    stages: dict[str, float]  # of STAGES, up to the first token; they add up to ttft
    tokens: tuple[float, ...]  # when each token was on the host, the first one being ttft
    length: int  # positions of the prompt in the language model, the image included

    @property
    def ttft(self) -> float:
        """Prepared pixels in, first token out."""
        return self.tokens[0]

    def per_token(self) -> float:
        """Mean time of a token after the first."""
        return (self.tokens[-1] - self.tokens[0]) / (len(self.tokens) - 1)

    def throughput(self, new_tokens: int, batch: int) -> float:
        """Tokens per second over a whole request of `new_tokens`: the paper's sense."""
        return batch * new_tokens / self.tokens[new_tokens - 1]


class Stopwatch:
    """A streamer that notes when tokens arrive, with hooks that note when stages end."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.tokens: list[float] = []
        self.length = 0
        self._marks: dict[str, Any] = {}

    @contextmanager
    def watching(self, model: nn.Module, language: bool = True) -> Iterator[None]:
        """Until the first token; the decoding steps run without hooks.

        Without `language`, whoever runs the language model marks "splice" and "prefill".
        """
        tower, projector, decoder = _parts(model)
        with ExitStack() as self._hooks:
            for module, before, after in (
                (tower, None, "tower"),
                # A method may project tokens to score them: the last time counts.
                (projector, "select", "project"),
                *([(decoder, "splice", None), (model, None, "prefill")] * language),
            ):
                self._watch(module, before, after)
            yield

    def mark(self, name: str) -> None:
        """Note that a stage ends here."""
        self._marks[name] = self.clock.mark()

    def put(self, value: Tensor) -> None:
        """Take the next token of every request; transformers hands in the prompt before."""
        if "prefill" in self._marks:
            self.tokens.append(self.clock.host_seconds())

    def end(self) -> None:
        """Nothing is left to be done."""

    def stages(self) -> dict[str, float]:
        """Seconds of each stage; `first` is choosing the token and bringing it to the host."""
        ends = [self.clock.seconds(self._marks[name]) for name in STAGES[:-1]] + [self.tokens[0]]
        starts = [0.0, *ends]
        return {name: end - begin for name, begin, end in zip(STAGES, starts, ends, strict=False)}

    def _watch(self, module: nn.Module, before: str | None, after: str | None) -> None:
        if before is not None:
            hook = partial(self._enter, before)
            handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            self._hooks.callback(handle.remove)
        if after is not None:
            handle = module.register_forward_hook(partial(self._leave, after))
            self._hooks.callback(handle.remove)

    def _enter(self, name: str, module: nn.Module, inputs: tuple, options: dict) -> None:
        self.mark(name)
        if name == "splice":
            self.length = options["inputs_embeds"].shape[1]

    def _leave(self, name: str, module: nn.Module, inputs: tuple, output: Any) -> None:
        self.mark(name)
        if name == "prefill":
            self._hooks.close()


def _parts(model: Any) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Vision tower, projector, decoder of an official LLaVA or of transformers' own."""
    if hasattr(model, "get_vision_tower"):
        decoder = model.get_model()
        return model.get_vision_tower().vision_tower, decoder.mm_projector, decoder
    inner = model.model
    return inner.vision_tower, inner.multi_modal_projector, inner.language_model
