"""Whether stored results still belong to the checkpoint and the code as they are.

Needs neither torch nor the checkpoint: what is not here is not compared.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval import ROOT
from eval.plan.table import Row
from eval.results.identity import checkpoint_digest, sources_digest

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
            self._sources[row.pruner] = source_of(row.pruner)
        now, then = self._sources[row.pruner], record.get("source")
        if now is None or now == then:
            return None
        if then is None or now[:_HALF] != then[:_HALF]:
            return "llava_hivtp changed"
        return f"the code of {row.pruner} changed"


def source_of(pruner: str) -> str | None:
    """Digest of the library and of a method's own file, None if that is not here."""
    file = method_file(pruner)
    return file and sources_digest(file)


def method_file(pruner: str) -> Path | None:
    """Where a method is written, read off the registry: importing it would take torch."""
    if ":" in pruner:
        return _defined_in(*pruner.split(":", 1))
    registry = ast.parse((ROOT / "llava_hivtp/pruners/__init__.py").read_text())
    (entries,) = (
        node.value
        for node in registry.body
        if isinstance(node, ast.AnnAssign) and node.target.id == "PRUNERS"
    )
    classes = {key.value: of.id for key, of in zip(entries.keys, entries.values, strict=True)}
    module = _imported_from(registry, classes.get(pruner), "llava_hivtp.pruners")
    return ROOT / f"{module.replace('.', '/')}.py" if module else None


def _defined_in(module: str, name: str) -> Path | None:
    """The file whose `name` a module has, followed through `from ... import name`."""
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    if not (found and found.origin and found.origin.endswith(".py")):
        return None
    file = Path(found.origin).resolve()
    package = module if found.submodule_search_locations else module.rpartition(".")[0]
    origin = _imported_from(ast.parse(file.read_bytes()), name, package)
    return _defined_in(origin, name) if origin else file


def _imported_from(code: ast.Module, name: str | None, package: str) -> str | None:
    """The module that a name at the top of some code is imported from, if it is."""
    for node in code.body:
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            return importlib.util.resolve_name("." * node.level + (node.module or ""), package)
    return None
