"""Which rows vLLM can serve, and what it is told of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from eval.digests import checkpoint_folder
from eval.plan.table import Row, Table


def overrides(row: Row) -> dict[str, Any] | None:
    """What `hivtp` in --hf-overrides says of a row, every field; None: stock vLLM."""
    if row.pruner == "none" and row.layout == "unpad":
        return None
    return {"layout": row.layout, "pruner": row.pruner, **asdict(row.build())}


def unservable(table: Table, rows: Iterable[Row]) -> Iterator[str]:
    """Why the checkpoint or a row cannot be served, one line each."""
    from transformers import AutoConfig

    from llava_hivtp.serving import ARCHITECTURES
    from llava_hivtp.serving.settings import settings_of

    try:
        config = AutoConfig.from_pretrained(checkpoint_folder(table.model))
        named = config.architectures or ["none"]
    except (OSError, ValueError):
        named = ["one that transformers does not know"]
    if not set(named) & set(ARCHITECTURES):
        yield (
            f"vLLM serves {', '.join(ARCHITECTURES)} of transformers; {table.model} is "
            f"{', '.join(named)}: name such a checkpoint with --model, "
            "llava_hivtp.convert.to_transformers writes official ones anew"
        )
        return
    if table.positions != "packed":
        yield f"{table.path}: positions={table.positions} cannot be served, only packed"
    for row in rows:
        config.hivtp = overrides(row)
        try:
            settings_of(config)
        except ValueError as error:
            yield f"{row.where}: row '{row.id}' cannot be served: {error}"
