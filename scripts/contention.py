"""How often a timed run says that others used the CPU: ten runs alone, ten beside busy loops.

    python scripts/contention.py --out eval/measured/contention

Every run is `python -m eval run` on the embedded model, 2 rows, 8 timed requests each, one thread.
Runs already in the .csv are not done again. On a machine that others use, `--first` lets the runs
without busy loops go before everybody else (real-time priority, which takes root): as on a machine
of one's own.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from eval import machine  # noqa: E402
from eval.clock import contended  # noqa: E402
from eval.efficiency.report import write_csv  # noqa: E402
from eval.markdown import pipes  # noqa: E402
from eval.nano.datasets import write  # noqa: E402
from eval.plan.table import load_table, select_rows  # noqa: E402
from eval.results.shelf import Shelf  # noqa: E402

CONFIG = ROOT / "configs" / "nano" / "table1.yaml"
ROWS, TASK, REQUESTS, LOOPS = "full hivtp-25", "pope", 8, 2


def main() -> None:
    """Do the runs that are left and write .csv and .md."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("results/contention"))
    parser.add_argument("--first", action="store_true")
    options = parser.parse_args()
    path = options.out.with_name(options.out.name + ".csv")
    rows = list(csv.DictReader(path.open())) if path.is_file() else []
    with tempfile.TemporaryDirectory() as folder:
        data = write(Path(folder) / "data", "quick")
        for loops in (0, LOOPS):
            for number in range(options.runs):
                if any(r["run"] == str(number) and r["loops"] == str(loops) for r in rows):
                    continue
                with busy(loops):
                    out = Path(folder) / f"{number}-{loops}"
                    found = run(data, out, options.first and not loops)
                rows += [{"run": str(number), "loops": str(loops)} | each for each in found]
                write_csv(path, rows)
    text = report(rows, options.first)
    options.out.with_name(options.out.name + ".md").write_text(text)
    print(text)


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Processes that never rest."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def run(data: Path, out: Path, first: bool) -> list[dict[str, str]]:
    """One timed run; a row of the .csv per row of the table."""
    table = load_table(CONFIG)
    table = load_table(CONFIG, str(ROOT / table.model))
    command = [sys.executable, "-m", "eval", "run", str(CONFIG), "--model", table.model]
    command += ["--rows", ROWS, "--tasks", TASK, "--limit", str(REQUESTS)]
    command += ["--timing-n", str(REQUESTS), "--data", str(data), "--out", str(out)]
    subprocess.run(
        (["chrt", "-f", "1"] if first else []) + command,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )
    shelf = Shelf(table, out, select_rows(table, ROWS), (TASK,), REQUESTS)
    times = {unit.row.id: shelf.timing(unit) for unit in shelf.units}
    return [
        {
            "row": name,
            "ttft_ms": f"{timing.ttft_ms:.2f}",
            "worked_share": f"{timing.worked_share:.3f}",
        }
        for name, timing in times.items()
    ]


def report(rows: Sequence[dict[str, str]], first: bool) -> str:
    """How many runs gave a warning, and what the times were."""
    cells = [["busy loops", "runs", "with a warning", "worked share", "TTFT full, ms", "ratio"]]
    for loops in ("0", str(LOOPS)):
        own = [row for row in rows if row["loops"] == loops]
        full, pruned = (
            [float(row["ttft_ms"]) for row in own if row["row"] == name] for name in ROWS.split()
        )
        shares = [float(row["worked_share"]) for row in own]
        ratios = [b / a for a, b in zip(full, pruned, strict=True)]
        warned = {row["run"] for row in own if contended(float(row["worked_share"]), "cpu")}
        cells.append(
            [loops, str(len(full)), str(len(warned))]
            + [f"{min(v):.2f} to {max(v):.2f}" for v in (shares, full, ratios)]
        )
    kept_first = "; the runs alone at real-time priority, since others use this machine" * first
    return (
        f"`python scripts/contention.py`: {REQUESTS} timed requests of the embedded model, rows in "
        f"turn, one thread{kept_first}. {machine.device_name()}, {os.cpu_count()} cores, "
        f"commit {machine.commit()}.\n\n{pipes(cells, left=0)}\n"
    )


if __name__ == "__main__":
    main()
