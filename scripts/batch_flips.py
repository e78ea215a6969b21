"""How many answers of the embedded model depend on the batch: float32 and the half precisions.

    python scripts/batch_flips.py --out eval/measured/batch-flips
    python scripts/batch_flips.py --table table2 --out eval/measured/batch-flips-anyres

All questions of the quick sets, batch 1, 8 and 16, unpruned and under HIVTP at 25 %. Answers lie
in `--answers`, and what lies there is not asked again.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "LOGURU_LEVEL": "WARNING"}

from eval import machine  # noqa: E402
from eval.efficiency.report import write_csv  # noqa: E402
from eval.markdown import pipes  # noqa: E402
from eval.nano import asked  # noqa: E402
from eval.plan.table import Table, load_table, select_rows  # noqa: E402

CONFIGS = ROOT / "configs" / "nano"
ROWS, BATCHES, DTYPES = "full hivtp-25", (1, 8, 16), ("float32", "bfloat16", "float16")


def main() -> None:
    """Ask what is left, write .csv and .md."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results/batch-flips"))
    parser.add_argument("--answers", type=Path, default=Path("results/batch-flips-answers"))
    parser.add_argument("--table", default="table1", help="of configs/nano; table2: AnyRes")
    parser.add_argument("--limit", type=int, help="questions per set; default: all")
    options = parser.parse_args()
    table = load_table(CONFIGS / f"{options.table}.yaml")
    answers = options.answers / options.table
    answers.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for dtype in DTYPES:
            for batch in BATCHES:
                ask_all(table, Path(folder), answers, dtype, batch, options.limit)
    rows = list(counts(answers))
    write_csv(options.out.with_name(options.out.name + ".csv"), rows)
    text = report(table.title, rows)
    options.out.with_name(options.out.name + ".md").write_text(text)
    print(text)


def ask_all(
    table: Table, folder: Path, answers: Path, dtype: str, batch: int, limit: int | None
) -> None:
    """Answer all questions at one dtype and batch; a file per row of the table."""
    rows = [
        r for r in select_rows(table, ROWS) if not file_of(answers, dtype, r.id, batch).exists()
    ]
    if not rows:
        return
    import torch

    from eval.nano.datasets import write
    from llava_hivtp.lmms import LlavaHIVTP

    torch.set_num_threads(1)
    data = write(folder / "data", "quick")
    model = str(ROOT / table.model)
    lm = LlavaHIVTP(
        model, dtype=dtype, device_map="cpu", batch_size=batch, workers=0, layout=table.layout
    )
    for row in rows:
        asked.ask(lm, row, table.tasks, data, limit, file_of(answers, dtype, row.id, batch))
        print(f"{dtype} batch {batch} {row.id}", file=sys.__stderr__)


def file_of(answers: Path, dtype: str, row: str, batch: int) -> Path:
    """Where the answers of a row lie."""
    return answers / f"{dtype}-{row}-{batch}.json"


def counts(answers: Path) -> Iterator[dict[str, Any]]:
    """A row per dtype, row of the table, batch and set."""
    for dtype in DTYPES:
        for row in ROWS.split():
            alone = asked.answers(file_of(answers, dtype, row, 1))
            for batch in BATCHES[1:]:
                found = asked.answers(file_of(answers, dtype, row, batch))
                for task, others in found["tasks"].items():
                    pairs = list(zip(alone["tasks"][task], others, strict=True))
                    yield {
                        "dtype": dtype,
                        "row": row,
                        "batch": batch,
                        "task": task,
                        "questions": len(pairs),
                        "differ": sum(a[0] != b[0] for a, b in pairs),
                        "better": sum(b[1] > a[1] for a, b in pairs),
                        "worse": sum(b[1] < a[1] for a, b in pairs),
                        "commit": found["commit"],
                    }


def report(title: str, rows: Sequence[dict[str, Any]]) -> str:
    """Sums over the sets, under a table's title."""
    cells = [["dtype", "row", "batch", "questions", "answers that differ", "better", "worse"]]
    for dtype, name, batch in itertools.product(DTYPES, ROWS.split(), BATCHES[1:]):
        case = (dtype, name, batch)
        own = [row for row in rows if (row["dtype"], row["row"], row["batch"]) == case]
        questions, differ, better, worse = (
            sum(row[key] for row in own) for key in ("questions", "differ", "better", "worse")
        )
        cells.append(
            [dtype, name, str(batch), str(questions), f"{differ} ({differ / questions:.1%})"]
        )
        cells[-1] += [str(better), str(worse)]
    return (
        f"`python scripts/batch_flips.py`, {title}: the quick sets, answers against those "
        f"at batch 1, and how many of them score better or worse. One thread, "
        f"{machine.device_name()}, torch {machine.version('torch')}, "
        f"transformers {machine.version('transformers')}, "
        f"commits {', '.join(sorted({r['commit'] for r in rows}))}.\n\n{pipes(cells, left=2)}\n"
    )


if __name__ == "__main__":
    main()
