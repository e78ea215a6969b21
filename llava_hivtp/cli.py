"""`llava-hivtp answer IMAGE QUESTION`: one answer, full and pruned side by side."""

from __future__ import annotations

import argparse
import itertools
import re
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EMBEDDED = Path(__file__).parents[1] / "eval" / "nano" / "checkpoints" / "v15"
# The embedded model has 12 encoder layers where the papers had 24.
EMBEDDED_LAYERS = {
    "hivtp": "4+5",
    "fopru": "11",
    "visionzip": "11",
    "vispruner": "11",
    "hired": "1+11",
    "prumerge": "12",
    "prumerge_plus": "12",
    "hiprune": "5+11",
}
_WRAP = 40  # columns of an answer
_SHORT = "\nAnswer the question using a single word or phrase."  # as its data sets ask


@dataclass(frozen=True)
class _Answer:
    """One model's answer and what it took."""

    title: str
    text: str
    kept: int  # image tokens in the language model, row breaks left out
    total: int
    ttft: float  # seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        answers = _answer_twice(options)
    except (FileNotFoundError, ImportError, ValueError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(_side_by_side(answers))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llava-hivtp", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    answer = commands.add_parser("answer", help="ask about one image, full and pruned")
    answer.add_argument("image", help="an image file of any format")
    answer.add_argument("question")
    answer.add_argument("--pruner", default="hivtp", help="method (default: %(default)s)")
    answer.add_argument(
        "--pruner-args", default="", metavar="K=V,...", help="such as r=2,k=25,c=2,layers=7+8+9+10"
    )
    answer.add_argument(
        "--model", help="folder or hub id; the small embedded model by default, in a checkout"
    )
    answer.add_argument("--layout", default="unpad", help="AnyRes layout: unpad or mosaic")
    answer.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    return parser


def _answer_twice(options: argparse.Namespace) -> list[_Answer]:
    """Answer without pruning, then with it; a first answer that is not timed warms up."""
    _hush()
    from llava_hivtp.images import open_image
    from llava_hivtp.loading import load
    from llava_hivtp.pruners import build_pruner

    embedded = options.model is None
    if embedded and not EMBEDDED.is_dir():
        raise FileNotFoundError(
            "the embedded model lies in a checkout of the project only; name one with --model, "
            "such as --model liuhaotian/llava-v1.5-7b"
        )
    settings = _settings(options.pruner_args)
    question = options.question
    if embedded:
        if options.pruner in EMBEDDED_LAYERS:
            settings = {"layers": EMBEDDED_LAYERS[options.pruner]} | settings
        question += "" if "\n" in question else _SHORT
    image = open_image(options.image)
    pruner = build_pruner(options.pruner, **settings)
    path = str(options.model or EMBEDDED)
    model, tokenizer, processor, _ = load(path, layout=options.layout)
    _warn_of_unknown_words(tokenizer, options.question)
    answers = []
    for method, title in ((build_pruner("none"), "full"), (pruner, options.pruner)):
        model.pruner = method
        for _ in range(2):
            answer = _answer(
                model, tokenizer, processor, image, question, path, options.max_new_tokens
            )
        answers.append(_Answer(title, *answer))
    return answers


def _hush() -> None:
    """Two answers are what was asked for, not how weights are read."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _settings(text: str) -> dict[str, str]:
    """`r=2,k=25` as a mapping; `build_pruner` reads the values."""
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    if not all(equals and value for _, equals, value in pairs):
        raise ValueError(f"--pruner-args takes key=value,key=value, got {text!r}")
    return {key.strip(): value.strip() for key, _, value in pairs}


class _Clock:
    """A streamer that notes when the first generated token is there."""

    def __init__(self) -> None:
        self.puts, self.first = 0, 0.0

    def put(self, _: Any) -> None:
        """Called with the prompt, then with every token."""
        self.puts += 1
        if self.puts == 2:
            self.first = time.perf_counter()

    def end(self) -> None:
        """Called after the last token."""


def _answer(
    model: Any, tokenizer: Any, processor: Any, image: Any, question: str, path: str, longest: int
) -> tuple[str, int, int, float]:
    """(text, kept, total, seconds to the first token) of one greedy answer."""
    import torch
    from llava.mm_utils import tokenizer_image_token

    from llava_hivtp.conversation import build_prompt, template_name
    from llava_hivtp.images import prepare_images

    template = template_name(path, model.config)
    clock, start = _Clock(), time.perf_counter()
    pixels, sizes = prepare_images([image], processor, model.config)
    ids = tokenizer_image_token(build_prompt(template, question, 1), tokenizer, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(
            ids[None].to(model.device),
            images=pixels,
            image_sizes=sizes,
            do_sample=False,
            max_new_tokens=longest,
            pad_token_id=tokenizer.pad_token_id,
            streamer=clock,
        )
    (text,) = tokenizer.batch_decode(output, skip_special_tokens=True)
    (packed,) = model.kept
    return text.strip(), packed.patches, packed.total, clock.first - start


def _warn_of_unknown_words(tokenizer: Any, question: str) -> None:
    words = re.findall(r"\w+", question)
    lost = [word for word in words if tokenizer.unk_token_id in tokenizer(word).input_ids]
    if lost:
        print(f"warning: the model has no token for {', '.join(lost)}", file=sys.stderr)


def _side_by_side(answers: list[_Answer]) -> str:
    names = ["", "answer", "image tokens", "first token"]
    columns = [_column(names)]
    for a in answers:
        columns.append(
            _column([a.title, a.text, f"{a.kept} of {a.total}", f"{1000 * a.ttft:.0f} ms"])
        )
    lines = []
    for cells in zip(*columns, strict=True):
        for parts in itertools.zip_longest(*cells, fillvalue=""):
            widths = (max(len(p) for c in column for p in c) for column in columns)
            padded = (part.ljust(width) for part, width in zip(parts, widths, strict=True))
            lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _column(cells: list[str]) -> list[list[str]]:
    return [textwrap.wrap(cell, _WRAP) or [""] for cell in cells]


if __name__ == "__main__":
    sys.exit(main())
