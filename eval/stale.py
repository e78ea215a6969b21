"""Whether stored results still belong to the checkpoint and the code as they are.

Needs neither torch nor the checkpoint: what is not here is not compared.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.identity import ROOT, checkpoint_digest, sources_digest
from eval.rows import Row

_HALF = 16  # digits of a source digest that stand for what all methods share


class Present:
    """The checkpoint and the source files as they are now."""

    def __init__(self, model: str) -> None:
        """Read a checkpoint's digest, if it is here."""
        try:
            self.checkpoint: str | None = checkpoint_digest(model)
        except (FileNotFoundError, ImportError):
            self.checkpoint = None
        self._sources: dict[str, str | None] = {}

    def change(self, row: Row, record: Mapping[str, Any]) -> str | None:
        """What is another thing than when a result or timing of the row was stored, if any."""
        if self.checkpoint not in (None, record["protocol"].get("checkpoint digest")):
            return "the checkpoint is another"
        if row.pruner not in self._sources:
            file = method_file(row.pruner)
            self._sources[row.pruner] = file and sources_digest(file)
        now, then = self._sources[row.pruner], record.get("source")
        if now is None or now == then:
            return None
        if then is None or now[:_HALF] != then[:_HALF]:
            return "llava_hivtp changed"
        return f"the code of {row.pruner} changed"


def method_file(pruner: str) -> Path | None:
    """Where a method is written, read off the registry: importing it would take torch."""
    if ":" in pruner:
        try:
            found = importlib.util.find_spec(pruner.partition(":")[0])
        except (ImportError, ValueError):
            return None
        return Path(found.origin).resolve() if found and found.origin else None
    modules, classes = {}, {}
    for node in ast.parse((ROOT / "llava_hivtp/pruners/__init__.py").read_text()).body:
        if isinstance(node, ast.ImportFrom):
            modules |= {alias.name: node.module for alias in node.names}
        elif isinstance(node, ast.AnnAssign) and node.target.id == "PRUNERS":
            entries = zip(node.value.keys, node.value.values, strict=True)
            classes = {key.value: value.id for key, value in entries}
    module = modules.get(classes.get(pruner))
    return ROOT / f"{module.replace('.', '/')}.py" if module else None
