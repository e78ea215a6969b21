"""One model behind the page: what visitors may ask of it, one request at a time."""

from __future__ import annotations

import io
import math
import random
import threading
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from eval.clock import Spread, interleave, ratios
from eval.figures.draw import draw_kept
from eval.figures.look import cropped_to, look
from eval.figures.panels import draw_heat
from eval.nano.draw import draw, draw_large
from eval.report.picture import Picture
from llava_hivtp.answer import Answer, answer, prompt_ids
from llava_hivtp.conversation import unknown_words
from llava_hivtp.images import open_image
from llava_hivtp.limits import Limits
from llava_hivtp.pruners import PRUNERS, Pruner, build_pruner, for_depth

LIMITS = Limits(side=6000, aspect=100)  # of an image; below the library's: others wait meanwhile
MAX_MEGABYTES = 20  # of a file
MAX_QUESTION = 500  # characters
MAX_ANSWER = 64  # tokens
TIMED = 5  # requests behind a TTFT
NO_WINDOWS = "none"  # no local stage
EXAMPLES = (  # kind of drawing, seed, question
    ("sign", 5, "What is written on the sign?"),
    ("scene", 3, "Is there a circle in the image?"),
    ("diagram", 8, "Is there a red box in the image?"),
)


@dataclass(frozen=True)
class TimedAnswer:
    """An answer, and the TTFT of TIMED further requests."""

    answer: Answer
    seconds: Spread
    ratio: Spread  # to the full model's, round by round


class SharedModel:
    """One model that serves one request at a time, whatever the number of threads that ask."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.lock = threading.Lock()
        tower = model.tower_of(model)
        self.depth, self.side = tower.layers, math.isqrt(tower.patches)
        self.tiled, self.layouts = model.aspect == "anyres", model.layouts

    def draw(self, image: Image.Image, prompt: str, pruner: Pruner, layout: str) -> Image.Image:
        """The kept tokens; a method may read the prompt."""
        with self.lock:
            self.model.pruner, self.model.layout = pruner, layout
            ids = prompt_ids(self.model, self.tokenizer, prompt)
            kept = look(self.model, image, prompt=ids).packed
            return _raster(draw_kept(image, kept, self.model))

    def heat(self, image: Image.Image, pruner: Pruner) -> Image.Image:
        """Importance in every encoder layer."""
        with self.lock:
            seen = look(self.model, image, range(1, self.depth + 1), Pruner())
            return _raster(draw_heat([seen], scored=pruner.layers))

    def answers(
        self, image: Image.Image, prompt: str, pruner: Pruner, layout: str
    ) -> tuple[TimedAnswer, TimedAnswer]:
        """The unpruned model's answer and the pruned one's, timed in turns."""

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
        times = [[each.ttft for each in again[i]] for i in range(2)]
        full, pruned = (
            TimedAnswer(found, Spread.of(taken), ratios(taken, times[0]))
            for found, taken in zip(answers, times, strict=True)
        )
        return full, pruned

    def notes(self, image: Image.Image | None, question: str) -> list[str]:
        """What of an image and a question the model does not see as it is."""
        check_question(question)
        said = []
        left = image and cropped_to(self.model, image.size)
        if left:
            sides = "{} x {} of {} x {}".format(*left, *image.size)
            said.append(f"The model sees the middle {sides} pixels: it crops to a square.")
        if lost := unknown_words(self.tokenizer, question):
            said.append(f"The model has no token for: {', '.join(lost)}.")
        return said

    def pruner(
        self, method: str, r: int, k: float, c: str, keep: float, layers: list[int]
    ) -> Pruner:
        """The method as the controls say; a ValueError tells what does not fit."""
        given = {"r": r, "k": k, "c": None if c == NO_WINDOWS else int(c), "keep": keep / 100}
        arguments: dict[str, Any] = {n: v for n, v in given.items() if n in settings_of(method)}
        if self.default_layers(method):
            arguments["layers"] = tuple(sorted(layers))
        pruner = build_pruner(method, **arguments)
        pruner.check(self.depth, self.side**2)
        return pruner

    def default_layers(self, method: str) -> list[int]:
        """Encoder layers a method reads on this model."""
        return list(for_depth(build_pruner(method), self.depth).layers)

    def divisors(self) -> list[int]:
        """What r and c may be: they cut the grid evenly."""
        return [d for d in range(1, self.side + 1) if self.side % d == 0]


def settings_of(method: str) -> set[str]:
    """Names of what can be set of a method."""
    return {field.name for field in fields(PRUNERS[method])}


def check_question(question: str) -> None:
    """Raise a ValueError fit to be shown if a question is too long."""
    if len(question) > MAX_QUESTION:
        raise ValueError(
            f"The question has {len(question)} characters; {MAX_QUESTION} are the most."
        )


def open_bounded(path: str | Path) -> Image.Image:
    """Open an uploaded image; too large or not an image is a ValueError fit to be shown."""
    name = Path(path).name
    try:
        if Path(path).stat().st_size > MAX_MEGABYTES * 2**20:
            raise ValueError(f"{name} is larger than {MAX_MEGABYTES} MB")
        size = _size(path)
    except Image.DecompressionBombError:
        raise ValueError(f"{name} is too large; {LIMITS.side} pixels a side are the most") from None
    except OSError:
        raise ValueError(f"{name} is no image that can be read") from None
    LIMITS.check(size, name)
    try:
        return open_image(path, LIMITS)
    except (OSError, ValueError):
        raise ValueError(f"{name} is damaged and cannot be read") from None


def examples(tiled: bool) -> list[tuple[Image.Image, str]]:
    """Drawings of our own with something to ask about each; larger ones for an AnyRes model."""
    found = []
    for kind, seed, words in EXAMPLES:
        rng = random.Random(seed)
        picture = draw_large(rng, kind, (288, 216)) if tiled else draw(rng, kind)
        found.append((picture.image, words))
    return found


def _size(path: str | Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.size
    except (SyntaxError, ValueError) as error:
        raise OSError(str(error)) from error


def _raster(figure: Picture) -> Image.Image:
    return Image.open(io.BytesIO(figure.png(dpi=110)))
