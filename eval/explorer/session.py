"""What the page does: one model, one request at a time, and the bounds of what it takes."""

from __future__ import annotations

import io
import random
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.clock import Spread, interleave

if TYPE_CHECKING:
    from PIL import Image

    from eval.figures.draw import Picture
    from llava_hivtp.answer import Answer
    from llava_hivtp.pruners import Pruner

MAX_SIDE = 6000  # pixels: LLaVA pads an image to a square, so a thin strip is large as well
MAX_FILE = "20mb"
MAX_QUESTION = 500  # characters
MAX_ANSWER = 64  # tokens
TIMED = 3  # requests behind a TTFT
NO_WINDOWS = "none"  # no local stage
EXAMPLES = (  # kind of drawing, seed, question
    ("scene", 3, "Is there a circle in the image?"),
    ("sign", 5, "What is written on the sign?"),
    ("diagram", 8, "Is there a red box in the image?"),
)


class Bench:
    """One model that serves one request at a time."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.lock = threading.Lock()
        config = model.get_vision_tower().config
        self.depth = config.num_hidden_layers
        self.side = config.image_size // config.patch_size
        self.tiled = getattr(model.config, "image_aspect_ratio", None) == "anyres"

    def draw(self, image: Image.Image, pruner: Pruner, layout: str) -> Image.Image:
        """The kept tokens."""
        from eval.figures.draw import draw_kept
        from eval.figures.look import look

        with self.lock:
            self.model.pruner, self.model.layout = pruner, layout
            kept = look(self.model, image).packed
            return _raster(draw_kept(image, kept, self.model))

    def heat(self, image: Image.Image, pruner: Pruner) -> Image.Image:
        """Importance in every encoder layer."""
        from eval.figures.look import look
        from eval.figures.panels import draw_heat

        with self.lock:
            self.model.pruner = pruner
            seen = look(self.model, image, range(1, self.depth + 1))
            return _raster(draw_heat([seen], scored=pruner.layers))

    def answers(
        self, image: Image.Image, prompt: str, pruner: Pruner, layout: str
    ) -> tuple[Answer, Answer]:
        """The unpruned model's answer and the pruned one's; TTFT as medians, taken in turns."""
        from llava_hivtp.answer import answer
        from llava_hivtp.pruners import Pruner

        def once(chosen: Pruner, tokens: int) -> Answer:
            self.model.pruner = chosen
            return answer(self.model, self.tokenizer, image, prompt, max_new_tokens=tokens)

        pair = (Pruner(), pruner)
        with self.lock:
            self.model.layout = layout
            # The first request of a kind pays for memory and caches: its time does not count.
            answers = [once(chosen, MAX_ANSWER) for chosen in pair]
            first = {i: partial(once, chosen, 1) for i, chosen in enumerate(pair)}
            again = interleave(first, TIMED, warmup=0)
        full, pruned = (
            replace(found, ttft=Spread.of(each.ttft for each in again[i]).median)
            for i, found in enumerate(answers)
        )
        return full, pruned

    def pruner(
        self, method: str, r: int, k: float, c: str, keep: float, layers: list[int]
    ) -> Pruner:
        """The method as the controls say; a ValueError tells what does not fit."""
        from eval.figures.look import fitted

        arguments: dict[str, Any] = {}
        if method == "hivtp":
            arguments = {"r": r, "k": k, "c": None if c == NO_WINDOWS else int(c)}
        elif method != "none":
            arguments = {"keep": keep / 100}
        if self.default_layers(method):
            arguments["layers"] = tuple(sorted(layers))
        pruner = fitted(method, self.depth, **arguments)
        pruner.check(self.depth, self.side**2)
        return pruner

    def default_layers(self, method: str) -> list[int]:
        """Encoder layers a method reads on this model."""
        from eval.figures.look import fitted

        return list(fitted(method, self.depth).layers)

    def divisors(self) -> list[int]:
        """What r and c may be: they cut the grid evenly."""
        return [d for d in range(1, self.side + 1) if self.side % d == 0]


def open_bounded(path: str | Path) -> Image.Image:
    """Open an uploaded image; too large or not an image is a ValueError fit to be shown."""
    from PIL import Image

    from llava_hivtp.images import open_image

    name = Path(path).name
    try:
        with Image.open(path) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        raise ValueError(f"{name} is too large; {MAX_SIDE} pixels a side are the most") from None
    except (OSError, SyntaxError, ValueError):
        raise ValueError(f"{name} is no image that can be read") from None
    if max(width, height) > MAX_SIDE:
        raise ValueError(
            f"{name} is {width} x {height} pixels; {MAX_SIDE} a side are the most: make it smaller"
        )
    try:
        return open_image(path)
    except (OSError, ValueError):
        raise ValueError(f"{name} is damaged and cannot be read") from None


def examples(tiled: bool) -> list[tuple[Image.Image, str]]:
    """Drawings of our own with something to ask about each; larger ones for an AnyRes model."""
    from eval.nano.draw import draw, draw_large

    found = []
    for kind, seed, words in EXAMPLES:
        rng = random.Random(seed)
        picture = draw_large(rng, kind, (288, 216)) if tiled else draw(rng, kind)
        found.append((picture.image, words))
    return found


def _raster(figure: Picture) -> Image.Image:
    from PIL import Image

    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return Image.open(file)
