"""`python -m eval explore`: a page in the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eval.verbs.options import says_errors


@says_errors
def explore(
    model: Annotated[
        str | None, typer.Option(envvar="MODEL", help="Checkpoint; default: the embedded.")
    ] = None,
    port: Annotated[int, typer.Option(envvar="PORT", help="0: any free one.")] = 7860,
    host: Annotated[
        str, typer.Option(help="Address to bind to; the page has no password.")
    ] = "127.0.0.1",
) -> None:
    """Open a page: pick an image, ask, move the sliders, see what is kept."""
    from llava_hivtp.quiet import quieten

    quieten()
    from eval.nano import EMBEDDED
    from eval.plan.tower import check_tiles

    check_tiles(model or EMBEDDED, "explore")
    try:
        from eval.explorer.page import build_page, launch
    except ImportError as error:
        raise ImportError(
            f"the page needs gradio ({error}): pip install 'llava_hivtp[demo]'"
        ) from error
    from eval.explorer.shared import SharedModel
    from llava_hivtp.loading import load

    llava, tokenizer, _, _ = load(model or EMBEDDED)
    title = Path(model).name if model else "The embedded model"
    launch(build_page(SharedModel(llava, tokenizer), title), host, port)
