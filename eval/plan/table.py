"""Tables as YAML: tasks, rows, printed numbers; every mistake is an error with its line.

A row of a table names a pruner and its arguments. Its results live under a path made from the
model, the pruner with its arguments, the layout and the task alone, so that two rows that say the
same thing, in one table or in two, are evaluated once.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from fnmatch import fnmatchcase
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.benchmarks.records import BENCHMARKS
from eval.plan.reader import ConfigError, Mapping, error_at, plain, read_yaml

if TYPE_CHECKING:
    from llava_hivtp.pruners.base import Pruner

SETS = ("paper", "control", "beyond")  # printed there; ours, to compare with; newer methods
LAYOUTS = ("unpad", "mosaic")
COUNTS = ("retain", "tokens")
TIMES = ("ttft_ms", "throughput")

_TABLE_KEYS = {"title", "models", "layout", "patches", "device", "tasks", "protocol", "rows"}
_ROW_KEYS = {"id", "pruner", "block", "section", "set", "printed"}  # the others are arguments
_ID = re.compile(r"[a-z][a-z0-9_.+-]*")


@dataclass(frozen=True)
class Row:
    """One line of a table: a pruner, its arguments, and what the paper prints for them."""

    id: str
    pruner: str
    arguments: dict[str, Any]
    block: int  # r_max in percent: the row keeps at most this share of the patches
    section: str  # rows that are compared with each other
    set: str  # one of SETS
    printed: dict[str, Decimal | int]
    layout: str
    where: str  # file:line, for messages

    @property
    def spelled(self) -> str:
        """The arguments as lmms-eval's --model_args spells them: `k=25,layers=7+8,c=none`."""
        return ",".join(f"{name}={_spell(value)}" for name, value in self.arguments.items())

    @property
    def folder(self) -> str:
        """Where its results live: readable, and different for all that differs."""
        identity = json.dumps([self.pruner, self.arguments, self.layout], sort_keys=True)
        digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
        words = sorted(self.spelled.split(",")) if self.arguments else []
        return re.sub(r"[^\w.,=+-]+", "_", f"{','.join([self.pruner, *words])}-{digest}")

    def build(self) -> Pruner:
        """The pruner itself (imports torch); an argument it refuses is an error with the line."""
        from llava_hivtp.pruners import build_pruner

        try:
            return build_pruner(self.pruner, **self.arguments)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{self.where}: row '{self.id}': {error}") from error


@dataclass(frozen=True)
class Table:
    """A paper's table: what to run, what was printed."""

    path: Path
    title: str
    model: str  # the checkpoint to run
    models: tuple[str, ...]  # the checkpoints the printed numbers may stand for
    layout: str
    patches: int  # per tile
    device: str  # of the printed times
    tasks: tuple[str, ...]
    protocol: dict[str, str]
    rows: tuple[Row, ...]

    @property
    def unpruned(self) -> Row | None:
        """The row every other one is compared with."""
        return next((row for row in self.rows if row.pruner == "none"), None)


def load_table(path: str | Path, model: str | None = None) -> Table:
    """Read and check a table; `model` replaces its first checkpoint."""
    path = Path(path)
    data = read_yaml(path)
    _known(path, data, _TABLE_KEYS, required=_TABLE_KEYS - {"device"})
    models = tuple(_strings(path, data, "models"))
    if data["layout"] not in LAYOUTS:
        raise error_at(path, data, "layout", f"layout must be one of {LAYOUTS}")
    if not isinstance(data["patches"], int) or data["patches"] < 1:
        raise error_at(path, data, "patches", "patches must be a count, such as 576")
    tasks = _tasks(path, data)
    table = Table(
        path=path,
        title=str(data["title"]),
        model=model or models[0],
        models=models,
        layout=data["layout"],
        patches=data["patches"],
        device=str(data.get("device", "")),
        tasks=tasks,
        protocol=_protocol(path, data, tasks),
        rows=(),
    )
    return replace(table, rows=_rows(path, data, table))


def with_results(path: Path, out: Path, model: str | None = None) -> list[Table]:
    """The table for its first checkpoint, and for its other ones that have results in `out`."""
    first = load_table(path, model)
    others = [] if model else first.models[1:]
    return [first, *(load_table(path, m) for m in others if (out / Path(m).name).is_dir())]


def select_rows(table: Table, names: str | None = None) -> tuple[Row, ...]:
    """Rows by id, pattern (`hivtp-*`), number from 1 or set (`paper`); all without names."""
    wanted = _split(names)
    chosen = set()
    for name in wanted:
        found = {i for i, row in enumerate(table.rows, 1) if _matches(name, i, row)}
        if not found:
            ids = ", ".join(row.id for row in table.rows)
            raise ConfigError(f"{table.path}: no row '{name}'; choose from {ids}, {SETS}")
        chosen |= found
    return tuple(row for i, row in enumerate(table.rows, 1) if not wanted or i in chosen)


def select_tasks(table: Table, names: str | None = None) -> tuple[str, ...]:
    """Tasks by name or column (`mmb`), in the table's order; all without names."""
    wanted = set(_split(names))
    known = {name for task in table.tasks for name in (task, BENCHMARKS[task].column)}
    if wanted - known:
        raise ConfigError(
            f"{table.path}: no task '{min(wanted - known)}'; choose from {', '.join(table.tasks)}"
        )
    return tuple(
        task
        for task in table.tasks
        if not wanted or task in wanted or BENCHMARKS[task].column in wanted
    )


def budget(row: Row, patches: int) -> int | None:
    """Most tokens a row may keep per tile; None for a pruner whose arguments do not tell.

    The library's `Pruner.budget` says the same; this one needs neither torch nor a model.
    """
    arguments = row.arguments
    if row.pruner == "none":
        return patches
    if row.pruner == "hivtp":
        return _hivtp_budget(patches, **{name: arguments.get(name, 0) for name in ("r", "k", "c")})
    if "dominant" in arguments:
        return arguments["dominant"] + arguments.get("contextual", 0)
    if "keep" in arguments:
        return math.floor(Fraction(str(arguments["keep"])) * patches)
    return None


def _hivtp_budget(patches: int, r: int, k: float, c: int | None) -> int:
    """p_max = r^2 floor(k/100 (n/r)^2) + (n/c)^2; the second term falls without a local stage."""
    side = math.isqrt(patches)
    for name, value in (("r", r), ("c", c)):
        if value is not None and (value < 1 or side % value):
            raise ValueError(f"{name}={value} must be given and divide the grid's side {side}")
    regions = r * r * math.floor(Fraction(str(k)) * (side // r) ** 2 / 100)
    return regions + ((side // c) ** 2 if c else 0)


def _rows(path: Path, data: Mapping, table: Table) -> tuple[Row, ...]:
    entries = data["rows"]
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise error_at(path, data, "rows", "rows must be a list of mappings")
    rows: dict[str, Row] = {}
    for entry in entries:
        row = _row(path, entry, table)
        if row.id in rows:
            raise error_at(path, entry, "id", f"row '{row.id}' is there twice")
        rows[row.id] = row
    return tuple(rows.values())


def _row(path: Path, entry: Mapping, table: Table) -> Row:
    for key in ("id", "pruner", "block"):
        if key not in entry:
            raise error_at(path, entry, None, f"a row needs '{key}'")
    identity, block = entry["id"], entry["block"]
    if not isinstance(identity, str) or not _ID.fullmatch(identity) or identity in SETS:
        raise error_at(path, entry, "id", f"'{identity}' must fit {_ID.pattern}, and be no set")
    if not isinstance(block, int) or not 0 < block <= 100:
        raise error_at(path, entry, "block", f"block is r_max in percent, got {block!r}")
    if entry.get("set", "paper") not in SETS:
        raise error_at(path, entry, "set", f"set must be one of {SETS}, got {entry['set']!r}")
    row = Row(
        id=identity,
        pruner=str(entry["pruner"]),
        arguments={key: plain(entry[key]) for key in entry if key not in _ROW_KEYS},
        block=block,
        section=str(entry.get("section", f"{block} %")),
        set=entry.get("set", "paper"),
        printed=_printed(path, entry, table.tasks),
        layout=table.layout,
        where=f"{path}:{entry.line}",
    )
    _check_budget(path, entry, row, table.patches)
    return row


def _printed(path: Path, entry: Mapping, tasks: Sequence[str]) -> dict[str, Decimal | int]:
    printed = entry.get("printed", Mapping())
    if not isinstance(printed, Mapping):
        raise error_at(path, entry, "printed", "printed must map columns to numbers")
    measured = {BENCHMARKS[task].column for task in tasks}
    columns = {benchmark.column for benchmark in BENCHMARKS.values()}
    for column, value in printed.items():
        if column in columns - measured:
            raise error_at(path, printed, column, f"no task of the table fills '{column}': add it")
        if column not in columns | {*COUNTS, *TIMES}:
            known = ", ".join([*COUNTS, *sorted(measured), *TIMES])
            raise error_at(path, printed, column, f"unknown column '{column}'; choose from {known}")
        if isinstance(value, bool) or not isinstance(value, (int, Decimal)):
            raise error_at(path, printed, column, f"{column} must be a number, got {value!r}")
    return dict(printed)


def _check_budget(path: Path, entry: Mapping, row: Row, patches: int) -> None:
    try:
        kept = budget(row, patches)
    except (TypeError, ValueError) as error:
        raise error_at(path, entry, None, f"row '{row.id}': {error}") from error
    allowed = row.block * patches // 100
    if kept is not None and kept > allowed:
        raise error_at(
            path,
            entry,
            None,
            f"row '{row.id}' may keep {kept} of {patches} tokens, its block of {row.block} % "
            f"allows {allowed}: lower its arguments or move it to another block",
        )


def _tasks(path: Path, data: Mapping) -> tuple[str, ...]:
    tasks = tuple(_strings(path, data, "tasks"))
    for task in tasks:
        if task not in BENCHMARKS:
            known = ", ".join(BENCHMARKS)
            raise error_at(path, data, "tasks", f"unknown task '{task}'; choose from {known}")
    columns = [BENCHMARKS[task].column for task in tasks]
    for column in columns:
        if columns.count(column) > 1:
            raise error_at(path, data, "tasks", f"two tasks for the column '{column}'")
    return tasks


def _protocol(path: Path, data: Mapping, tasks: Sequence[str]) -> dict[str, str]:
    """What the numbers of each column mean; must be what its task measures."""
    protocol = data["protocol"]
    measured = {BENCHMARKS[task].column: BENCHMARKS[task].measures for task in tasks}
    if not isinstance(protocol, Mapping):
        raise error_at(path, data, "protocol", "protocol must say what each column measures")
    _known(path, protocol, set(measured), required=set(measured))
    for column, meaning in protocol.items():
        if meaning != measured[column]:
            raise error_at(
                path,
                protocol,
                column,
                f"{column} is to be '{meaning}', but its task measures '{measured[column]}'",
            )
    return dict(protocol)


def _strings(path: Path, data: Mapping, key: str) -> list[str]:
    values = data[key]
    if not isinstance(values, list) or not values or not all(isinstance(v, str) for v in values):
        raise error_at(path, data, key, f"{key} must be a list of names, and not empty")
    return values


def _known(path: Path, data: Mapping, keys: set[str], required: set[str]) -> None:
    for key in data:
        if key not in keys:
            raise error_at(path, data, key, f"unknown key '{key}'; choose from {sorted(keys)}")
    for key in sorted(required - data.keys()):
        raise error_at(path, data, None, f"'{key}' is missing")


def _matches(name: str, number: int, row: Row) -> bool:
    return name in (str(number), row.set) or fnmatchcase(row.id, name)


def _split(names: str | None) -> list[str]:
    return re.split(r"[\s,]+", names.strip(" ,\n")) if names and names.strip(" ,\n") else []


def _spell(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(str, value))
    return "none" if value is None else str(value)
