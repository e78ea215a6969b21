"""One request, cut into stages at the moments the model passes by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from eval.efficiency.ideal import Request
from eval.efficiency.measure import Clock

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

    from eval.efficiency.graphs import Graphs
    from llava_hivtp.pruners import Pruner

STAGES = ("tower", "select", "project", "splice", "prefill", "first")
IMAGE_AT = 2  # position of the image in the prompt


@dataclass(frozen=True)
class Case:
    """One way to serve a request; without a pruner it is stock LLaVA, unattached."""

    name: str
    pruner: Pruner | None
    layout: str = "unpad"
    block: int = 100  # r_max in percent

    @property
    def label(self) -> str:
        """Name, and the layout where it matters."""
        return self.name if self.layout == "unpad" else f"{self.name}, {self.layout}"


@dataclass(frozen=True)
class Inputs:
    """A prepared batch: pixels on the CPU as `prepare_images` gives them, token ids."""

    images: Tensor | list[Tensor]
    image_sizes: list[tuple[int, int]]
    prompt: Tensor  # (batch, text tokens and one image marker)

    @property
    def batch(self) -> int:
        """Equal requests at once."""
        return len(self.prompt)

    @property
    def tiles(self) -> int:
        """Per image."""
        image = next(iter(self.images))
        return 1 if image.ndim == 3 else len(image)

    @property
    def text(self) -> int:
        """Tokens per prompt, the image apart."""
        return self.prompt.shape[1] - 1


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


def make_inputs(model: Any, processor: Any, size: tuple[int, int], batch: int, text: int) -> Inputs:
    """Equal requests on a random picture of (width, height) with `text` random prompt tokens."""
    import numpy as np
    import torch
    from llava.constants import IMAGE_TOKEN_INDEX

    from llava_hivtp.images import prepare_images

    if text <= IMAGE_AT:
        raise ValueError(f"a prompt of {text} tokens is too short: give at least {IMAGE_AT + 1}")
    images, sizes = prepare_images([random_picture(size)], processor, model.config)
    images = images * batch if isinstance(images, list) else torch.cat([images] * batch)
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, model.config.vocab_size, text))
    prompt = torch.cat([ids[:IMAGE_AT], torch.tensor([IMAGE_TOKEN_INDEX]), ids[IMAGE_AT:]])
    return Inputs(images, sizes * batch, prompt.repeat(batch, 1).to(model.device))


def random_picture(size: tuple[int, int]) -> Image:
    """Smooth colours, (width, height), the same every time."""
    import numpy as np
    from PIL import Image

    coarse = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def run_request(
    model: Any,
    case: Case,
    inputs: Inputs,
    new_tokens: int,
    cpu_time: bool = False,
    graphs: Graphs | None = None,
) -> Run:
    """Serve a request through `model.generate`, or through graphs, and time its stages.

    The end of sequence is switched off: every method writes exactly `new_tokens` tokens.
    """
    import torch

    choose(model, case)
    stopwatch = Stopwatch(Clock(model.device, cpu_time))
    serve = partial(_generate, model) if graphs is None else graphs.generate
    with torch.inference_mode(), stopwatch.watching(model, language=graphs is None):
        stopwatch.clock.start()
        images = inputs.images if case.pruner else _as_stock(model, inputs.images)
        serve(inputs.prompt, images, inputs.image_sizes, new_tokens, stopwatch)
    if len(stopwatch.tokens) != new_tokens:
        raise RuntimeError(f"{case.label} wrote {len(stopwatch.tokens)} tokens, not {new_tokens}")
    return Run(stopwatch.stages(), tuple(stopwatch.tokens), stopwatch.length)


def _generate(
    model: Any, prompt: Tensor, images: Any, image_sizes: Any, new_tokens: int, stopwatch: Stopwatch
) -> None:
    model.generation_config.eos_token_id = None
    model.generate(
        prompt,
        images=images,
        image_sizes=image_sizes,
        do_sample=False,
        max_new_tokens=new_tokens,
        pad_token_id=0,
        streamer=stopwatch,
    )


def choose(model: Any, case: Case) -> None:
    """Make the model serve this case: attach its pruner, or give the stock class back."""
    from llava_hivtp import attach, detach

    if case.pruner is None:
        detach(model)
    else:
        attach(model, case.pruner, case.layout)


def sizes_of(model: Any, case: Case, inputs: Inputs, run: Run) -> Request:
    """The sizes that a request had, for its closed forms."""
    layers = model.get_vision_tower().config.num_hidden_layers
    tower = model.get_vision_tower()
    if case.pruner is None:  # all layers run, every token of every tile is projected
        return Request(
            inputs.batch, inputs.tiles, layers, inputs.tiles * tower.num_patches, run.length
        )
    depth = tower.select_layer + (layers + 1 if tower.select_layer < 0 else 0)
    projected = round(sum(len(image.kept) for image in model.kept) / inputs.batch)
    return Request(inputs.batch, inputs.tiles, depth, projected, run.length)


def _as_stock(model: Any, images: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    """Pixels as stock LLaVA needs them; ours casts and moves them itself."""
    if isinstance(images, list):
        return [image.to(model.device, model.dtype) for image in images]
    return images.to(model.device, model.dtype)


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
        tower = model.get_vision_tower().vision_tower
        projector = model.get_model().mm_projector
        with ExitStack() as self._hooks:
            for module, before, after in (
                (tower, None, "tower"),
                # A method may project tokens to score them: the last time counts.
                (projector, "select", "project"),
                *([(model.get_model(), "splice", None), (model, None, "prefill")] * language),
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
