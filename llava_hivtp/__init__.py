"""Training-free visual token pruning for LLaVA: HIVTP and its peers on equal terms."""

from __future__ import annotations

from typing import Any

from llava_hivtp.pruners import PRUNERS, build_pruner

__version__ = "0.1.0"
__all__ = ["PRUNERS", "attach", "build_pruner", "detach", "load"]


def __getattr__(name: str) -> Any:
    # LLaVA and transformers are imported on first use, so pruners run without them.
    if name in ("attach", "detach"):
        from llava_hivtp import families

        return getattr(families, name)
    if name == "load":
        from llava_hivtp.loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
