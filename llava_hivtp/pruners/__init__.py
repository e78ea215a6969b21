"""The methods by name, and how to build one."""

from __future__ import annotations

import ast
import importlib
from dataclasses import fields
from typing import Any

from llava_hivtp.pruners.avgpool import AvgPool
from llava_hivtp.pruners.base import Pruner, ScorePruner
from llava_hivtp.pruners.divprune import DivPrune
from llava_hivtp.pruners.fopru import FoPru
from llava_hivtp.pruners.hiprune import HiPrune
from llava_hivtp.pruners.hired import HiRED
from llava_hivtp.pruners.hivtp import HIVTP
from llava_hivtp.pruners.holov import HoloV
from llava_hivtp.pruners.prumerge import PruMerge, PruMergePlus
from llava_hivtp.pruners.random import Random
from llava_hivtp.pruners.scope import SCOPE
from llava_hivtp.pruners.uniform import Uniform
from llava_hivtp.pruners.visionzip import VisionZip
from llava_hivtp.pruners.vispruner import VisPruner

PRUNERS: dict[str, type[Pruner]] = {
    "none": Pruner,
    "hivtp": HIVTP,
    "fopru": FoPru,
    "visionzip": VisionZip,
    "prumerge": PruMerge,
    "prumerge_plus": PruMergePlus,
    "hired": HiRED,
    "vispruner": VisPruner,
    "divprune": DivPrune,
    "hiprune": HiPrune,
    "scope": SCOPE,
    "holov": HoloV,
    "random": Random,
    "uniform": Uniform,
    "avgpool": AvgPool,
}


def build_pruner(name: str, **arguments: Any) -> Pruner:
    """Build a method by its name in PRUNERS or as "package.module:Class".

    Text is read as a command line spells it: `layers="7+8+9+10"`, `c="none"`, `keep="0.25"`.

    Raises:
        ValueError: for an unknown name, an unknown argument, or a value the method refuses.
    """
    cls = _find(name)
    known = [field.name for field in fields(cls)]
    unknown = sorted(set(arguments) - set(known))
    if unknown:
        raise ValueError(f"pruner {name!r} takes no {', '.join(unknown)}; it takes {known}")
    values = {key: _read(value) for key, value in arguments.items()}
    if "layers" in values:
        values["layers"] = _layers(values["layers"])
    return cls(**values)


def _find(name: str) -> type[Pruner]:
    if name in PRUNERS:
        return PRUNERS[name]
    module, colon, attribute = str(name).partition(":")
    if not colon:
        raise ValueError(
            f"unknown pruner {name!r}; choose from {', '.join(sorted(PRUNERS))}, "
            "or name your own as package.module:Class"
        )
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"pruner {name!r} cannot be imported: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, Pruner)):
        raise ValueError(f"pruner {name!r} is no subclass of llava_hivtp.pruners.base.Pruner")
    return cls


def _read(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value.lower() in ("none", "true", "false"):
        return {"none": None, "true": True, "false": False}[value.lower()]
    try:
        return ast.literal_eval(value) if "+" not in value else value
    except (ValueError, SyntaxError):
        return value


def _layers(value: Any) -> tuple[int, ...]:
    parts = value.split("+") if isinstance(value, str) else value
    parts = [parts] if isinstance(parts, int) else parts
    try:
        if any(isinstance(part, float) for part in parts):
            raise ValueError
        return tuple(int(part) for part in parts)
    except (TypeError, ValueError):
        raise ValueError(f"layers must be such as 7+8+9+10, got {value!r}") from None


__all__ = ["HIVTP", "PRUNERS", "Pruner", "ScorePruner", "build_pruner"]
