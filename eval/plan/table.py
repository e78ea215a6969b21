"""Tables as YAML: tasks, rows, printed numbers; every mistake is an error with its line.

A row of a table names a pruner and its arguments. Its results live under a path made from the
model, the pruner with its arguments, the layout and the task alone, so that two rows that say the
same thing, in one table or in two, are evaluated once.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from decimal import Decimal
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.benchmarks.records import BENCHMARKS
from eval.plan.elsewhere import Printed, read_elsewhere
from eval.plan.reader import ConfigError, Mapping, error_at, plain, read_yaml

if TYPE_CHECKING:
    from llava_hivtp.pruners.base import Pruner

# printed there; to compare with; newer; yours; of a checkpoint trained under the method
SETS = ("paper", "control", "beyond", "own", "tuned")
COUNTS = ("retain", "tokens")
TIMES = ("ttft_ms", "throughput")
PREPARATION = "preparation_ms"  # before TTFT begins; no paper prints it

_TABLE_KEYS = {"title", "models", "layout", "patches", "tasks", "protocol", "rows"}
_OPTIONAL_KEYS = {"device", "positions", "elsewhere"}
_LIKE_KEYS = {"like", "title", "models", "layout"}
_ROW_KEYS = {
    "id",
    "pruner",
    "block",
    "section",
    "set",
    "name",
    "printed",
    "checkpoint",
    "calibrated",
}  # others: arguments
_ID = re.compile(r"[a-z][a-z0-9_.+-]*")


@dataclass(frozen=True)
class Calibration:
    """How a row's number of tokens was set: `python -m eval calibrate` writes it."""

    task: str  # whose questions were drawn
    sample: int  # questions
    seed: int  # of the draw
    model: str
    tokens: float  # of an image on average, as wished
    reached: float


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
    positions: str
    where: str  # file:line, for messages
    name: str = ""  # shown instead of the method's own
    absent: str = ""  # why the method's module cannot be imported
    checkpoint: str = ""  # of its own, where it was tuned; else the table's
    calibration: Calibration | None = None

    @property
    def spelled(self) -> str:
        """The arguments as lmms-eval's --model_args spells them: `k=25,layers=7+8,c=none`."""
        return ",".join(f"{name}={_spell(value)}" for name, value in self.arguments.items())

    @property
    def folder(self) -> str:
        """Where its results live: readable, and different for all that differs."""
        kept = [self.positions] if self.positions != "packed" else []
        identity = json.dumps([self.pruner, self.arguments, self.layout, *kept], sort_keys=True)
        digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
        words = sorted(self.spelled.split(",")) if self.arguments else []
        return re.sub(r"[^\w.,=+-]+", "_", f"{','.join([self.pruner, *words])}-{digest}")

    def build(self) -> Pruner:
        """The pruner itself (imports torch); an argument it refuses is an error with the line."""
        from llava_hivtp.pruners import build_pruner

        try:
            return build_pruner(self.pruner, **self.arguments)
        except Exception as error:  # a method of the user's may fail in any way
            raise ConfigError(f"{self.where}: row '{self.id}': {error}") from error


@dataclass(frozen=True)
class Table:
    """A paper's table: what to run, what was printed."""

    path: Path
    title: str
    model: str  # the checkpoint to run
    models: tuple[str, ...]  # the checkpoints the printed numbers may stand for
    layout: str
    positions: str
    patches: int  # per tile
    device: str  # of the printed times
    tasks: tuple[str, ...]
    protocol: dict[str, str]
    rows: tuple[Row, ...]
    elsewhere: tuple[Printed, ...] = ()  # what other papers print for its methods

    def printed_elsewhere(self, row: Row) -> dict[str, dict[str, Printed]]:
        """Paper and its table -> benchmark -> number, for a row's method at its count.

        The count is that of the row's section, `64 tokens`; the unpruned row's, whatever it is.
        """
        found: dict[str, dict[str, Printed]] = {}
        models = {Path(model).name for model in self.models}
        for one in self.elsewhere if row.set != "control" else ():
            same = row.pruner == "none" or row.section == f"{one.tokens} tokens"
            if one.method == row.pruner and one.model in models and same:
                found.setdefault(f"{one.paper}, {one.table}", {})[one.benchmark] = one
        return found

    @property
    def unpruned(self) -> Row | None:
        """The row every other one is compared with."""
        return next((row for row in self.rows if row.pruner == "none"), None)


def load_table(path: str | Path, model: str | None = None) -> Table:
    """Read and check a table, building every row's method; `model` replaces its first checkpoint.

    Imports torch, but neither LLaVA nor transformers. A method of the user's whose module is not
    here is no error yet: what was measured with it can still be read.
    """
    from llava_hivtp.anyres import PLACES

    path = Path(path)
    data = read_yaml(path)
    if "like" in data:
        return _like(path, data, model)
    _known(path, data, _TABLE_KEYS | _OPTIONAL_KEYS, required=_TABLE_KEYS)
    models = tuple(_strings(path, data, "models"))
    _check_heading(path, data)
    if data.get("positions", "packed") not in PLACES:
        raise error_at(path, data, "positions", f"positions must be one of {PLACES}")
    if type(data["patches"]) is not int or data["patches"] < 1:
        raise error_at(path, data, "patches", "patches must be a count, such as 576")
    tasks = _tasks(path, data)
    table = Table(
        path=path,
        title=str(data["title"]),
        model=model or models[0],
        models=models,
        layout=data["layout"],
        positions=data.get("positions", "packed"),
        patches=data["patches"],
        device=str(data.get("device", "")),
        tasks=tasks,
        protocol=_protocol(path, data, tasks),
        rows=(),
        elsewhere=_elsewhere(path, data),
    )
    return replace(table, rows=_rows(path, data, table))


def with_results(path: Path, out: Path, model: str | None = None) -> list[Table]:
    """The table for its first checkpoint, and for its other ones that have results in `out`."""
    first = load_table(path, model)
    others = [] if model else first.models[1:]
    return [first, *(load_table(path, m) for m in others if (out / Path(m).name).is_dir())]


def select_rows(table: Table, names: str | None = None) -> tuple[Row, ...]:
    """Rows by id, pattern (`hivtp-*`), number from 1 or set (`paper`).

    Without names all of the table's checkpoint: tuned rows, of other ones, are asked for.
    """
    wanted = _split(names)
    chosen = set()
    for name in wanted:
        found = {i for i, row in enumerate(table.rows, 1) if _matches(name, i, row)}
        if not found:
            ids = ", ".join(row.id for row in table.rows)
            raise ConfigError(f"{table.path}: no row '{name}'; choose from {ids}, {SETS}")
        chosen |= found
    if not wanted:
        return tuple(row for row in table.rows if not row.checkpoint)
    return tuple(row for i, row in enumerate(table.rows, 1) if i in chosen)


def one_row(table: Table, name: str) -> Row:
    """The row of this id, pattern or number; an error if it is none or several."""
    found = select_rows(table, name)
    if len(found) != 1:
        ids = ", ".join(row.id for row in found or table.rows)
        raise ConfigError(f"{table.path}: one row is needed, not {name!r}; choose from {ids}")
    return found[0]


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


def _like(path: Path, data: Mapping, model: str | None) -> Table:
    """Another table on other checkpoints in another layout; `unprinted` columns are not compared.

    Without its tuned rows, whose checkpoints are of the other table's classes.
    """
    _known(path, data, _LIKE_KEYS | {"unprinted"}, required=_LIKE_KEYS)
    _check_heading(path, data)
    models = tuple(_strings(path, data, "models"))
    columns = _strings(path, data, "unprinted") if "unprinted" in data else []
    other = Path(os.path.normpath(path.parent / str(data["like"])))
    if not other.is_file():
        raise error_at(path, data, "like", f"like must name a table's file, got {data['like']!r}")
    table = load_table(other, model or models[0])
    unknown = set(columns) - {name for row in table.rows for name in row.printed}
    if unknown:
        raise error_at(path, data, "unprinted", f"no row of it prints {sorted(unknown)}")
    rows = [
        replace(
            row,
            layout=data["layout"],
            printed={name: row.printed[name] for name in row.printed if name not in columns},
        )
        for row in table.rows
        if not row.checkpoint
    ]
    own = {"title": data["title"], "models": models, "layout": data["layout"]}
    return replace(table, path=path, rows=tuple(rows), **own)


def _check_heading(path: Path, data: Mapping) -> None:
    from llava_hivtp.anyres import LAYOUTS

    if data["layout"] not in LAYOUTS:
        raise error_at(path, data, "layout", f"layout must be one of {LAYOUTS}")
    if not isinstance(data["title"], str):
        raise error_at(path, data, "title", f"title must be text, got {data['title']!r}")


def _rows(path: Path, data: Mapping, table: Table) -> tuple[Row, ...]:
    entries = data["rows"]
    mappings = isinstance(entries, list) and all(isinstance(entry, Mapping) for entry in entries)
    if not mappings or not entries:
        raise error_at(path, data, "rows", "rows must be a list of mappings, and not empty")
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
    identity, block, pruner = entry["id"], entry["block"], entry["pruner"]
    if not isinstance(identity, str) or not _ID.fullmatch(identity) or identity in SETS:
        raise error_at(path, entry, "id", f"'{identity}' must fit {_ID.pattern}, and be no set")
    if type(block) is not int or not 0 < block <= 100:
        raise error_at(path, entry, "block", f"block is r_max in percent, got {block!r}")
    for key in ("pruner", "section", "name", "checkpoint"):
        if not isinstance(entry.get(key, ""), str):
            raise error_at(path, entry, key, f"{key} must be text, got {entry[key]!r}")
    chosen = entry.get("set", "own" if ":" in pruner else "paper")
    if chosen not in SETS:
        raise error_at(path, entry, "set", f"set must be one of {SETS}, got {chosen!r}")
    tuned = chosen == "tuned"
    if tuned != bool(entry.get("checkpoint")):
        raise error_at(path, entry, None, f"row '{identity}': set 'tuned' goes with a 'checkpoint'")
    row = Row(
        id=identity,
        pruner=pruner,
        arguments={key: _argument(path, entry, key) for key in entry if key not in _ROW_KEYS},
        block=block,
        section=entry.get("section", f"{block} %"),
        set=chosen,
        printed=_printed(path, entry, table.tasks),
        layout=table.layout,
        positions=table.positions,
        where=f"{path}:{entry.line}",
        name=entry.get("name", ""),
        absent=_absent(path, entry),
        checkpoint=entry.get("checkpoint", "").replace("{model}", Path(table.model).name),
        calibration=_calibration(path, entry),
    )
    calibrated = False if row.absent else row.build().calibrated
    if row.calibration and not (calibrated or row.absent):
        raise error_at(
            path, entry, "calibrated", f"row '{identity}' keeps a fixed number: leave it out"
        )
    if not row.absent:
        _check_budget(path, entry, row, 100 if calibrated else block, table.patches)
    # Not held to the block, or not training-free, so not compared in it.
    apart = ", calibrated" if calibrated else ", tuned" if tuned else ""
    return row if "section" in entry else replace(row, section=f"{row.section}{apart}")


def _argument(path: Path, entry: Mapping, key: str) -> Any:
    value = plain(entry[key])
    for item in value if isinstance(value, list) else [value]:
        if item is not None and not isinstance(item, (bool, int, float, str)):
            raise error_at(path, entry, key, f"{key} must be a number, a word or a list of them")
    return value


def _absent(path: Path, entry: Mapping) -> str:
    """Why a method's module cannot be imported, or nothing; a name that nobody has is an error."""
    from llava_hivtp.pruners import find_pruner

    try:
        find_pruner(entry["pruner"])
    except ValueError as error:
        if error.__cause__ is None:
            raise error_at(path, entry, "pruner", f"row '{entry['id']}': {error}") from error
        return str(error)
    return ""


def _calibration(path: Path, entry: Mapping) -> Calibration | None:
    """How the number of tokens was set, where a row says it."""
    given = entry.get("calibrated")
    if given is None:
        return None
    kinds = {"task": str, "sample": int, "seed": int, "model": str}
    names = {field.name for field in fields(Calibration)}
    if not isinstance(given, Mapping):
        raise error_at(path, entry, "calibrated", f"calibrated must give {', '.join(names)}")
    _known(path, given, names, required=names)
    found = {name: plain(value) for name, value in given.items()}
    for name, value in found.items():
        wanted = kinds.get(name, (int, float))
        if isinstance(value, bool) or not isinstance(value, wanted):
            raise error_at(path, given, name, f"calibrated: {name} cannot be {value!r}")
    return Calibration(**found)


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


def _check_budget(path: Path, entry: Mapping, row: Row, block: int, patches: int) -> None:
    """An error unless the method takes the row's arguments and stays within a block."""
    from llava_hivtp.pruners import LayerPruner

    pruner = row.build()
    if isinstance(pruner, LayerPruner):
        return  # its mean over the layers hangs on their number: the preflight of a run checks it
    try:
        kept = pruner.budget(1, patches)
    except Exception as error:  # a method of the user's may fail in any way
        raise error_at(path, entry, None, f"row '{row.id}': {error}") from error
    allowed = block * patches // 100
    if kept > allowed:
        raise error_at(
            path,
            entry,
            None,
            f"row '{row.id}' may keep {kept} of {patches} tokens, its block of {row.block} % "
            f"allows {allowed}: name its share, lower it or move the row to another block",
        )


def _elsewhere(path: Path, data: Mapping) -> tuple[Printed, ...]:
    """The numbers of the file that a table names beside itself."""
    name = data.get("elsewhere")
    if name is None:
        return ()
    if not isinstance(name, str) or not name.endswith(".csv"):
        raise error_at(path, data, "elsewhere", f"elsewhere must name a CSV, got {name!r}")
    found = read_elsewhere(path.parent / name)
    known = {Path(model).name for model in data["models"]}
    if not any(one.model in known for one in found):
        raise error_at(path, data, "elsewhere", f"{name} has no number for {', '.join(known)}")
    return found


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
    if not isinstance(values, list) or not values or not all(_is_name(v) for v in values):
        raise error_at(path, data, key, f"{key} must be a list of names, and not empty")
    return values


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


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
