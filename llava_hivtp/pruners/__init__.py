"""The methods by name, and how to build one."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from dataclasses import MISSING, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from llava_hivtp.pruners.avgpool import AvgPool
from llava_hivtp.pruners.base import PaperLayers, Pruner, ScorePruner
from llava_hivtp.pruners.cdpruner import CDPruner
from llava_hivtp.pruners.cover import Cover
from llava_hivtp.pruners.dart import DART
from llava_hivtp.pruners.divprune import DivPrune
from llava_hivtp.pruners.fastv import FastV
from llava_hivtp.pruners.fopru import FoPru
from llava_hivtp.pruners.hiprune import HiPrune
from llava_hivtp.pruners.hired import HiRED
from llava_hivtp.pruners.hivtp import HIVTP
from llava_hivtp.pruners.holov import HoloV
from llava_hivtp.pruners.layered import LayerPruner
from llava_hivtp.pruners.pdrop import PDrop
from llava_hivtp.pruners.prumerge import PruMerge, PruMergePlus
from llava_hivtp.pruners.random import Random
from llava_hivtp.pruners.scope import SCOPE
from llava_hivtp.pruners.sparsevlm import SparseVLM
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
    "cover": Cover,
    "holov": HoloV,
    "cdpruner": CDPruner,
    "random": Random,
    "uniform": Uniform,
    "avgpool": AvgPool,
}

LAYER_PRUNERS: dict[str, type[LayerPruner]] = {  # these work inside the language model
    "fastv": FastV,
    "pdrop": PDrop,
    "sparsevlm": SparseVLM,
    "dart": DART,
}


def build_pruner(name: str, /, **arguments: Any) -> Pruner:
    """Build a method by its name in PRUNERS or LAYER_PRUNERS, or one of your own.

    Your own is "package.module:Class" where Python finds the package, that is on PYTHONPATH, or
    "path/file.py:Class".

    Text is read as a command line spells it: `layers="7+8+9+10"`, `c="none"`, `keep="0.25"`,
    `encoder="hivtp:r=2:k=25"`.

    Raises:
        TypeError: if the name is no text.
        ValueError: for an unknown name, an unknown argument, or a value the method refuses.
    """
    cls = find_pruner(name)
    known = [field.name for field in fields(cls) if field.init]
    unknown = sorted(set(arguments) - set(known))
    if unknown:
        raise ValueError(f"pruner {name!r} takes no {', '.join(unknown)}; it takes {known}")
    needed = [f.name for f in fields(cls) if f.init and f.default is f.default_factory is MISSING]
    if missing := [key for key in needed if key not in arguments]:
        raise ValueError(f"pruner {name!r} needs {', '.join(missing)}")
    values = {key: _read(value) for key, value in arguments.items()}
    for key in ("layers", "after"):
        if key in values:
            values[key] = _layers(values[key])
    if issubclass(cls, LayerPruner):
        values |= {key: _layered(key, value) for key, value in values.items()}
    return cls(**values)


def for_depth(pruner: Pruner, depth: int, among: tuple[int, ...] = ()) -> Pruner:
    """The method for an encoder of another depth than a paper's 24, reading layers `among` only.

    Layers that are a paper's move along, see `PaperLayers.at`; layers that were named stay.
    """
    if isinstance(pruner, LayerPruner):
        return replace(pruner, encoder=for_depth(pruner.encoder, depth, among))
    paper = isinstance(pruner.layers, PaperLayers)
    if not paper or (depth == PaperLayers.depth and not among):
        return pruner
    return replace(pruner, layers=pruner.layers.at(depth, among))


def read_arguments(text: str) -> dict[str, str]:
    """`r=2,k=25` as a mapping; `build_pruner` reads the values.

    Raises:
        ValueError: if a part is no key=value, or a key comes twice.
    """
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    found: dict[str, str] = {}
    for key, _, value in ((k.strip(), e, v.strip()) for k, e, v in pairs):
        if not key or not value:
            raise ValueError(f"arguments are key=value,key=value; got {text!r}")
        if key in found:
            raise ValueError(f"{key} comes twice in {text!r}")
        found[key] = value
    return found


def read_pruner(text: str, between: str = ",") -> Pruner:
    """Build a method from one word, arguments behind the name: `hivtp:r=2,k=14,c=3`.

    A method of your own keeps its colon: `package.module:Class:keep=0.25`. `between` is what stands
    between arguments: ":" within another method's, as in `fastv:keep=0.5,encoder=hivtp:r=2:k=14`.
    """
    parts = text.split(":")
    first = next((i for i, part in enumerate(parts) if "=" in part), len(parts))
    arguments = ":".join(parts[first:]).replace(between, ",")
    return build_pruner(":".join(parts[:first]), **read_arguments(arguments))


def find_pruner(name: str) -> type[Pruner]:
    """The class behind a name as `build_pruner` takes it, with its errors."""
    if not isinstance(name, str):
        raise TypeError(f"a pruner's name is text, got {name!r}")
    if name in (known := PRUNERS | LAYER_PRUNERS):
        return known[name]
    module, colon, attribute = name.rpartition(":")
    if not colon:
        raise ValueError(
            f"unknown pruner {name!r}; choose from {', '.join(sorted(known))}, "
            "or name your own as package.module:Class or path/file.py:Class"
        )
    try:
        cls = getattr(_import(module), attribute)
    except Exception as error:  # a file of the user's may fail in any way
        raise ValueError(
            f"pruner {name!r} cannot be imported: {type(error).__name__}: {error}; put the folder "
            "of its package on PYTHONPATH, or name its file: path/file.py:Class"
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, Pruner)):
        raise ValueError(f"pruner {name!r} is no subclass of llava_hivtp.pruners.base.Pruner")
    return cls


def _import(module: str) -> ModuleType:
    """A module by its name, or by the path of its file; a file is read once."""
    if not module.endswith(".py"):
        return importlib.import_module(module)
    path = Path(module).resolve()
    name = f"llava_hivtp_file_{path}"  # dataclasses look their module up in sys.modules
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = found = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(found)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _read(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value.lower() in ("none", "true", "false"):
        return {"none": None, "true": True, "false": False}[value.lower()]
    try:
        return ast.literal_eval(value) if "+" not in value else value
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return value


def _layered(key: str, value: Any) -> Any:
    """What only methods inside the language model take: shares in a row, another method."""
    if key == "encoder" and isinstance(value, str):
        return read_pruner(value, between=":")
    if key == "keep" and isinstance(value, (str, list)):
        parts = value.split("+") if isinstance(value, str) else value
        return tuple(_read(part) for part in parts)
    return value


def _layers(value: Any) -> tuple[int, ...]:
    parts = value.split("+") if isinstance(value, str) else value
    parts = [parts] if type(parts) is int else parts
    try:
        if any(isinstance(part, (float, bool)) for part in parts):
            raise ValueError
        return tuple(int(part) for part in parts)
    except (TypeError, ValueError):
        raise ValueError(f"layers must be such as 7+8+9+10, got {value!r}") from None


__all__ = [
    "HIVTP",
    "LAYER_PRUNERS",
    "PRUNERS",
    "LayerPruner",
    "Pruner",
    "ScorePruner",
    "build_pruner",
    "find_pruner",
    "for_depth",
    "read_arguments",
    "read_pruner",
]
