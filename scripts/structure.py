"""The shape of the code in numbers: `python scripts/structure.py [CHECKOUT]`.

Lines of Python and shell outside tests, the longest functions, the modules that lie directly in
`eval/`, and the import circles among the project's own modules (imports inside functions count).
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

CODE = ("llava_hivtp", "eval", "scripts")
LONGEST = 5


def main(root: Path) -> None:
    """Print the figures of a checkout."""
    files = [file for name in CODE for file in sorted((root / name).rglob("*"))]
    files = [root / "setup.py", *(f for f in files if f.suffix in (".py", ".sh", ".sbatch"))]
    lines = sum(len(file.read_text().splitlines()) for file in files)
    trees = {file: ast.parse(file.read_text()) for file in files if file.suffix == ".py"}
    print(f"lines outside tests: {lines} in {len(files)} files")
    print(f"modules directly in eval/: {len(list((root / 'eval').glob('*.py')))}")
    functions = sorted((f for file, tree in trees.items() for f in _functions(file, tree, root)))
    for length, name in functions[: -LONGEST - 1 : -1]:
        print(f"function of {length} lines: {name}")
    circles = list(_circles(_imports(trees, root)))
    print(f"import circles: {len(circles)}")
    for circle in circles:
        print(f"  {' <-> '.join(sorted(circle))}")


def _functions(file: Path, tree: ast.Module, root: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.end_lineno - node.lineno + 1, f"{node.name} ({file.relative_to(root)})"


def _imports(trees: dict[Path, ast.Module], root: Path) -> dict[str, set[str]]:
    """Module -> the project's own modules it imports, imports for type checkers left out."""
    names = {_module(file, root): tree for file, tree in trees.items()}
    return {name: set(_imported(tree, names)) - {name} for name, tree in names.items()}


def _module(file: Path, root: Path) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(tree: ast.AST, names: dict[str, ast.Module]) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                found = f"{node.module}.{alias.name}"
                found = found if found in names else node.module
                if found in names:
                    yield found
        yield from _imported(node, names)


def _circles(imports: dict[str, set[str]]) -> Iterator[set[str]]:
    """Sets of modules that reach one another, each once."""
    reach = {name: _reachable(name, imports) for name in imports}
    seen: set[str] = set()
    for name in imports:
        circle = {other for other in reach[name] if name in reach[other]}
        if circle and name not in seen:
            seen |= circle
            yield circle | {name}


def _reachable(start: str, imports: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    todo = [start]
    while todo:
        for name in imports[todo.pop()] - found:
            found.add(name)
            todo.append(name)
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve())
