"""`llava-hivtp answer IMAGE QUESTION`: one answer, full and pruned side by side."""

from __future__ import annotations

import argparse
import itertools
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from llava_hivtp.anyres import LAYOUTS
from llava_hivtp.limits import Limits
from llava_hivtp.pruners import Pruner, build_pruner, for_depth, read_arguments
from llava_hivtp.quiet import quieten

if TYPE_CHECKING:
    from llava_hivtp.answer import Answer

SETTINGS = "llava_hivtp.toml"  # names a folder's default model
_TIMED = 3  # requests behind a time
_WRAP = 40  # characters of a column


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
        "--model", help=f"folder or hub id (default: the one that {SETTINGS} names)"
    )
    answer.add_argument(
        "--suffix", help="text behind a question of one line, such as how to answer"
    )
    answer.add_argument("--layout", default="unpad", help=f"AnyRes layout: {', '.join(LAYOUTS)}")
    answer.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    limits = Limits()
    answer.add_argument(
        "--max-side", type=int, default=limits.side, metavar="PIXELS", help="default: %(default)s"
    )
    answer.add_argument(
        "--max-aspect", type=float, default=limits.aspect, metavar="A", help="default: %(default)s"
    )
    return parser


def _answer_twice(options: argparse.Namespace) -> dict[str, tuple[Answer, list[float]]]:
    """Answer without pruning, then with it: by title, the answer and times to the first token."""
    quieten()
    from llava_hivtp.answer import answer
    from llava_hivtp.conversation import unknown_words
    from llava_hivtp.images import open_image
    from llava_hivtp.loading import load

    model_path, suffix = _model(options)
    limits = Limits(options.max_side, options.max_aspect)
    pruner = build_pruner(options.pruner, **read_arguments(options.pruner_args))
    image = open_image(options.image, limits)
    model, tokenizer, *_ = load(model_path, layout=options.layout)
    tower = model.tower_of(model)
    pruner = for_depth(pruner, tower.layers, tower.everywhere)
    model.pruner = pruner  # before the first answer: it may not fit
    if lost := unknown_words(tokenizer, options.question):
        print(f"warning: the model has no token for {', '.join(lost)}", file=sys.stderr)

    def once(method: Pruner, tokens: int) -> Answer:
        model.pruner = method
        question = options.question + ("" if "\n" in options.question else suffix)
        return answer(model, tokenizer, image, question, max_new_tokens=tokens, limits=limits)

    methods = {"full": Pruner(), options.pruner: pruner}
    found = {title: once(method, options.max_new_tokens) for title, method in methods.items()}
    rounds = [[once(method, 1).ttft for method in methods.values()] for _ in range(_TIMED)]
    times = map(list, zip(*rounds, strict=True))
    return {title: (found[title], own) for title, own in zip(methods, times, strict=True)}


def _model(options: argparse.Namespace) -> tuple[str | Path, str]:
    """The model and what goes behind the question: as asked, or as SETTINGS here or above says."""
    if options.model is not None:
        return options.model, options.suffix or ""
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (folder / SETTINGS).is_file():
            import tomllib

            settings = tomllib.loads((folder / SETTINGS).read_text()).get("answer", {})
            if not isinstance(settings.get("model"), str):
                raise ValueError(f"{folder / SETTINGS} names no model under [answer]")
            suffix = settings.get("suffix", "") if options.suffix is None else options.suffix
            local = folder / settings["model"]
            return local if local.is_dir() else settings["model"], suffix
    raise FileNotFoundError(
        "no model: name one with --model, such as --model liuhaotian/llava-v1.5-7b, "
        f"or in a {SETTINGS} here or above"
    )


def _side_by_side(answers: Mapping[str, tuple[Answer, list[float]]]) -> str:
    columns = [_column(["", "answer", "image tokens", "first token", f"of {_TIMED} requests"])]
    for title, (found, times) in answers.items():
        tokens = f"{found.patches} of {found.total}"
        if found.mean_per_layer is not None:
            tokens += f", {found.mean_per_layer:.1f} in the mean layer"
        least, middle, most = (1000 * time for time in (min(times), median(times), max(times)))
        spread = f"{least:.0f} to {most:.0f} ms"
        columns.append(_column([title, found.text, tokens, f"{middle:.0f} ms", spread]))
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
