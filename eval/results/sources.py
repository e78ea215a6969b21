"""The code an answer passes through, file by file, as digests that a comment does not change.

Every answer passes through the lmms-eval plug-in, the module that prunes the model, and what these
import of the library; a row's also through its method's own module, what that imports, and its
settings as they were built. The command line, the pages, other methods and other families of models
are no part of it.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from eval.plan.table import Row

LIBRARY = "llava_hivtp"
EVERY = f"{LIBRARY}.lmms"  # the door all answers come through
# They name the parts; a new entry changes no answer.
LISTS = {LIBRARY, f"{LIBRARY}.pruners", f"{LIBRARY}.families.known"}
SETTINGS, MODEL = "settings", "model"

# module -> digest of its code; SETTINGS -> the method as built; MODEL -> the model's module
Sources = dict[str, str]


class Code:
    """Digests of the modules as they are now; each file is read once."""

    def __init__(self) -> None:
        """Read nothing yet."""
        self._rows: dict[tuple[str, str, str], Sources] = {}

    def of(self, row: Row, model: str) -> Sources:
        """What the answers of a row depend on; `model` is the module that prunes the model."""
        key = row.pruner, row.spelled, model
        if key not in self._rows:
            self._rows[key] = self._of(row, model)
        return self._rows[key]

    def _of(self, row: Row, model: str) -> Sources:
        pruner = row.build()
        methods = [pruner, *([pruner.encoder] if hasattr(pruner, "encoder") else [])]
        classes = [cls for method in methods for cls in type(method).__mro__ if cls is not object]
        own = [cls.__module__ for cls in classes]
        modules = _closure([EVERY, model, *own])
        found = {_label(name, file): _digest(file) for name, file in sorted(modules.items())}
        return found | {SETTINGS: repr(pruner), MODEL: model}

    def changed(self, row: Row, then: Sources | str | None) -> str | None:
        """What is another thing than when a result was stored, as in `... changed since`."""
        if not isinstance(then, dict) or MODEL not in then:
            return "the way code is compared changed"
        return _difference(self.of(row, then[MODEL]), then)


def _difference(now: Sources, then: Sources) -> str | None:
    names = sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))
    if not names:
        return None
    shown = ", ".join("the method's settings" if name == SETTINGS else name for name in names[:3])
    return f"{shown}{f' and {len(names) - 3} more' if len(names) > 3 else ''} changed"


def _label(name: str, file: Path) -> str:
    """The same on every machine: a method's own file is imported by its whole path."""
    return file.name if "/" in name else name


def _closure(modules: list[str]) -> dict[str, Path]:
    """Modules and all they import, directly or not, of their packages and folders."""
    packages = {module.partition(".")[0] for module in modules}
    folders = {file.parent for module in modules if (file := module_file(module))}
    found: dict[str, Path] = {}

    def own(name: str, file: Path) -> bool:
        beside = not folders.isdisjoint(file.parents) and "site-packages" not in file.parts
        return beside or name.partition(".")[0] in packages

    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        file = None if name in found or name in LISTS else module_file(name)
        if file is not None and own(name, file):
            found[name] = file
            waiting += _imports(name, file)
    return found


@cache
def module_file(name: str) -> Path | None:
    """The source file of a module, None if it has none; nothing is imported to find it."""
    loaded = getattr(sys.modules.get(name), "__file__", None)
    if loaded:
        return Path(loaded) if loaded.endswith(".py") else None
    top, *parts = name.split(".")
    try:
        package = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if not parts:
        return Path(package.origin) if package and package.has_location else None
    for folder in (package and package.submodule_search_locations) or ():
        stem = Path(folder, *parts)
        for file in (stem.with_name(f"{stem.name}.py"), stem / "__init__.py"):
            if file.is_file():
                return file
    return None


@cache
def _imports(name: str, file: Path) -> frozenset[str]:
    return frozenset(_names(name, file))


def _names(name: str, file: Path) -> Iterator[str]:
    """Names that may be modules: imported anywhere in a file, or spelled as text."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(_parsed(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            module = importlib.util.resolve_name(module, package) if node.level else module
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and str(node.value).startswith(f"{LIBRARY}."):
            yield str(node.value).partition(":")[0]  # as importlib takes it


@cache
def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_bytes())


@cache
def _digest(file: Path) -> str:
    """Of the code alone: no comments, no docstrings, no line breaks."""
    tree = _parsed(file)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0])
        for node in ast.walk(tree)
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None
    }
    return hashlib.sha256(_spelled(tree, docstrings).encode()).hexdigest()[:16]


def _spelled(node: object, skip: set[int]) -> str:
    """A syntax tree as text; `ast.dump` writes another one in every version of Python."""
    if isinstance(node, list):
        return f"[{','.join(_spelled(item, skip) for item in node if id(item) not in skip)}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    parts = [f"{n}={_spelled(v, skip)}" for n, v in ast.iter_fields(node) if v not in (None, [])]
    return f"{type(node).__name__}({','.join(parts)})"
