"""`python -m eval efficiency`: where the time goes, pruned and not, beside what physics allows."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eval.plan.table import LAYOUTS, Table, load_table, select_rows

if TYPE_CHECKING:
    from eval.efficiency.report import Result


def efficiency(
    model: Annotated[str, typer.Argument(help="Checkpoint, a folder or a hub id.")] = "",
    random_weights: Annotated[
        str, typer.Option(help="Instead of a checkpoint: random weights of this shape.")
    ] = "",
    layers: Annotated[
        int | None, typer.Option(help="Language-model layers of --random-weights, to fit a CPU.")
    ] = None,
    table: Annotated[Path | None, typer.Option(help="Methods of a table's YAML.")] = None,
    rows: Annotated[str, typer.Option(help="Its rows: ids, patterns, numbers, sets.")] = "paper",
    method: Annotated[
        list[str] | None, typer.Option(help="A method, hivtp:r=2,k=14,c=3; may be repeated.")
    ] = None,
    size: Annotated[list[str] | None, typer.Option(help="WIDTHxHEIGHT; may be repeated.")] = None,
    layout: Annotated[str, typer.Option(help="Layouts of AnyRes tiles, by comma.")] = "unpad",
    text: Annotated[int, typer.Option(help="Prompt tokens beside the image.")] = 64,
    new_tokens: Annotated[str, typer.Option(help="Answer lengths, by comma.")] = "2,4,10",
    batch: Annotated[str, typer.Option(help="Batch sizes, by comma.")] = "1",
    rounds: Annotated[int, typer.Option(help="Interleaved rounds after a warm-up.")] = 20,
    seconds: Annotated[
        float, typer.Option(help="Begin no further round once so many are over; 0: no limit.")
    ] = 0,
    device: Annotated[str, typer.Option(help="cuda or cpu; a GPU if there is one.")] = "",
    dtype: Annotated[str, typer.Option(help="float16 on a GPU, float32 on a CPU.")] = "",
    attention: Annotated[str, typer.Option(help="sdpa, eager or flash_attention_2.")] = "sdpa",
    graphs: Annotated[
        bool, typer.Option(help="Replay tower, prefill and decoding as CUDA graphs.")
    ] = False,
    largest_batch: Annotated[
        bool, typer.Option(help="Also find the largest batch that fits a GPU.")
    ] = False,
    ceilings: Annotated[
        str,
        typer.Option(
            help="Print the closed forms alone, no run, for a device of TFLOP/s,GB/s or that of a "
            ".csv of this command."
        ),
    ] = "",
    threads: Annotated[int, typer.Option(help="CPU threads; 0: as torch chooses.")] = 0,
    cpu_time: Annotated[
        bool, typer.Option(help="On a CPU others use too: count own CPU time; with --threads 1.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Stem of the files written.")] = Path(
        "results/efficiency"
    ),
) -> None:
    """Time every stage of a request: stock LLaVA, nothing pruned, and every method, in turn.

    TTFT runs from prepared pixels in to the first token out, on the host. Preparing pixels takes
    every method the same time; it is printed apart. Every method writes equally many tokens.
    """
    end = time.monotonic() + (seconds or math.inf)
    lengths = tuple(integers("new-tokens", new_tokens))
    batches = integers("batch", batch)
    if ceilings:
        typer.echo(_closed_forms(random_weights, ceilings, batches, lengths, text))
        return
    import torch

    from eval.efficiency import bench
    from eval.efficiency.measure import machine

    if threads:
        torch.set_num_threads(threads)
    layouts = _words("layout", layout)
    if unknown := set(layouts) - set(LAYOUTS):
        raise typer.BadParameter(f"--layout {unknown.pop()}: choose from {LAYOUTS}")
    sizes = [_size(each) for each in size or ["336x336"]]
    try:
        methods = load_table(table) if table else None
        cases = bench.bases(layouts) + bench.spelled_cases(method or [], layouts)
        if methods:
            cases += bench.table_cases(select_rows(methods, rows), layouts)
        made = bench.Bench.build(
            model,
            random_weights,
            layers,
            device,
            dtype,
            attention,
            cpu_time,
            graphs,
            text=text,
            rounds=rounds,
            new_tokens=lengths,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    found = machine(made.device) | {
        "attention": attention,
        "graphs": "tower, prefill, decoding" if graphs else "",
        "clock": "process" if cpu_time and made.device.type == "cpu" else "wall",
    }
    files = _Files(out, lengths, found, methods)
    settings = [(each, count) for each in sizes for count in batches]
    for i, (each, count) in enumerate(settings):
        now = time.monotonic()
        results = made.measure(cases, each, count, now + (end - now) / (len(settings) - i))
        typer.echo(files.add(results))
        typer.echo(files.remark(made.preparing(each)))
        if largest_batch and made.device.type == "cuda" and count == batches[-1]:
            for said in made.rooms(results):
                typer.echo(files.remark(said))
    typer.echo(f"written: {files.named('.csv')}, {files.named('.md')}, a plot per setting")


class _Files:
    """One CSV and one Markdown file that grow with every setting, and a plot of each."""

    def __init__(
        self, stem: Path, lengths: tuple[int, ...], machine: dict[str, str], table: Table | None
    ) -> None:
        self.stem, self.lengths, self.machine, self.table = stem, lengths, machine, table
        self._rows: list[dict[str, Any]] = []
        self._sections: list[str] = []

    def named(self, ending: str) -> Path:
        """The stem may hold dots: llava-v1.5-7b."""
        return self.stem.with_name(self.stem.name + ending)

    def add(self, results: Sequence[Result]) -> str:
        """Write everything so far, so that an interruption loses one setting; returns the news."""
        from eval.efficiency import report
        from eval.efficiency.plot import draw

        section = report.markdown(results, self.lengths, self.machine, self.table)
        self._sections.append(section)
        self._rows += report.rows(results, self.lengths, self.machine)
        report.write_csv(self.named(".csv"), self._rows)
        self._write_text()
        setting, batch = results[0].setting, results[0].request.batch
        wide, high = setting.size
        middle = self.lengths[len(self.lengths) // 2]
        draw(self.named(f"-{wide}x{high}-batch{batch}.png"), results, middle, self.table)
        return section

    def remark(self, said: str) -> str:
        """A line below the last setting; returns it."""
        self._sections[-1] += f"- {said}\n"
        self._write_text()
        return f"- {said}"

    def _write_text(self) -> None:
        self.named(".md").write_text("\n".join(self._sections))


def _closed_forms(
    names: str, ceilings: str, batches: list[int], lengths: tuple[int, ...], text: int
) -> str:
    from eval.efficiency.ideal import Ceilings
    from eval.efficiency.report import expected, measured_ceilings
    from eval.efficiency.shapes import SHAPES

    try:
        if ceilings.endswith(".csv"):
            limits, itemsize = measured_ceilings(Path(ceilings))
        else:
            tera, giga = (float(word) for word in ceilings.split(","))
            limits, itemsize = Ceilings(1e12 * tera, 1e9 * giga), 2
    except (ValueError, OSError) as error:
        raise typer.BadParameter(
            f"--ceilings {ceilings}: write TFLOP/s,GB/s or name a .csv of this command; {error}"
        ) from None
    models = [names] if names else [name for name in SHAPES if not name.startswith("tiny")]
    return expected(models, batches, lengths, text, limits, itemsize)


def _words(option: str, spelled: str) -> list[str]:
    words = [word for word in re.split(r"[\s,]+", spelled) if word]
    if not words:
        raise typer.BadParameter(f"--{option} is empty")
    return words


def integers(option: str, spelled: str) -> list[int]:
    words = _words(option, spelled)
    if not all(word.isdecimal() and int(word) for word in words):
        raise typer.BadParameter(f"--{option} {spelled}: whole numbers from 1, by comma")
    return sorted({int(word) for word in words})


def _size(spelled: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", spelled)
    if not found:
        raise typer.BadParameter(f"--size {spelled}: write WIDTHxHEIGHT, such as 640x480")
    return int(found[1]), int(found[2])
