"""`llava-hivtp answer IMAGE QUESTION`: one answer, full and pruned side by side."""

from __future__ import annotations

import argparse
import itertools
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llava_hivtp.answer import Answer

EMBEDDED = Path(__file__).parents[1] / "eval" / "nano" / "checkpoints" / "nodrop"
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
    "scope": "11",
    "holov": "11",
}
_WRAP = 40  # characters of a column
_SHORT = "\nAnswer the question using a single word or phrase."  # as its data sets ask


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        answers = _answer_twice(options)
    except (FileNotFoundError, ImportError, ValueError, TypeError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
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


def _answer_twice(options: argparse.Namespace) -> dict[str, Answer]:
    """Answer without pruning, then with it, by title."""
    _hush()
    from llava_hivtp.answer import answer
    from llava_hivtp.conversation import unknown_words
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
    model, tokenizer, *_ = load(options.model or EMBEDDED, layout=options.layout)
    if lost := unknown_words(tokenizer, options.question):
        print(f"warning: the model has no token for {', '.join(lost)}", file=sys.stderr)
    answers = {}
    for method, title in ((build_pruner("none"), "full"), (pruner, options.pruner)):
        model.pruner = method
        for _ in range(2):  # the first one warms up
            answers[title] = answer(
                model, tokenizer, image, question, max_new_tokens=options.max_new_tokens
            )
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


def _side_by_side(answers: Mapping[str, Answer]) -> str:
    columns = [_column(["", "answer", "image tokens", "first token"])]
    for title, found in answers.items():
        tokens = f"{found.image.patches} of {found.image.total}"
        columns.append(_column([title, found.text, tokens, f"{1000 * found.ttft:.0f} ms"]))
    lines = []
    for cells in zip(*columns, strict=True):
        for parts in itertools.zip_longest(*cells, fillvalue=""):
            widths = (max(len(p) for c in column for p in c) for column in columns)
            padded = (part.ljust(width) for part, width in zip(parts, widths, strict=True))
            lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _column(cells: list[str]) -> list[list[str]]:
    """Every cell as lines no wider than a column."""
    return [textwrap.wrap(cell, _WRAP) or [""] for cell in cells]


if __name__ == "__main__":
    sys.exit(main())
