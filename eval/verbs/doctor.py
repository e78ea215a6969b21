"""What is installed, what is missing, what to do about it."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from eval.benchmarks import data as datasets
from eval.benchmarks.records import BENCHMARKS

TRANSFORMERS = ("5.23.0", "4.37.2")  # the two environments the tests run in
LMMS_EVAL = "0.7.3"
OPTIONAL = {
    "triton": "a faster score on GPUs; comes with torch for CUDA",
    "flash_attn": "attn_implementation=flash_attention_2: pip install flash-attn",
    "bitsandbytes": "quantization=8bit or 4bit: pip install bitsandbytes",
    "deepspeed": "python -m eval run --zero3: pip install -r third_party/requirements-zero3.txt",
    "gradio": "python -m eval explore: pip install gradio",
}


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    level: str  # ok, note (a feature less) or broken (nothing runs)
    name: str
    text: str


def doctor(
    data: Annotated[Path, typer.Option(help="Folder of the data sets.")] = Path("data"),
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("results"),
) -> None:
    """Check the installation; exit status 1 if something needed is broken."""
    findings = [*_libraries(), *_optional(), *_plug_in(), *_device(), *_folders(data, out)]
    for finding in findings:
        typer.echo(f"{finding.level:7} {finding.name:14} {finding.text}")
    broken = [finding.name for finding in findings if finding.level == "broken"]
    typer.echo(f"broken: {', '.join(broken)}" if broken else "ready")
    if broken:
        raise typer.Exit(1)


def _libraries() -> Iterator[Finding]:
    """What every run needs; importing is the only proof that a wheel fits its neighbours."""
    for module, package, remedy in (
        ("torch", "torch", "make setup, or pip install torch"),
        ("transformers", "transformers", f"pip install transformers=={TRANSFORMERS[0]}"),
        ("llava.model", "llava-torch", "pip install --no-deps llava-torch==1.2.2.post1"),
        ("llava_hivtp.loading", "llava_hivtp", "pip install --no-deps -e . in the checkout"),
        ("datasets", "datasets", "pip install datasets"),
        ("lmms_eval.evaluator", "lmms_eval", f"pip install --no-deps lmms-eval=={LMMS_EVAL}"),
    ):
        yield _imported(module, package, remedy)
    yield from _torchvision()
    yield from _pinned("transformers", TRANSFORMERS)
    yield from _pinned("lmms_eval", (LMMS_EVAL,))


def _imported(module: str, package: str, remedy: str) -> Finding:
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken neighbour raises anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        return Finding("broken", package, f"{reason}; {remedy}")
    return Finding("ok", package, _version(package) or "from the checkout, not installed")


def _torchvision() -> Iterator[Finding]:
    """On a machine without a GPU the wheel from PyPI breaks transformers' image processors."""
    if _version("torchvision") is None:
        return
    found = _imported("torchvision", "torchvision", "pip uninstall torchvision: it is not needed")
    yield found


def _pinned(package: str, tested: tuple[str, ...]) -> Iterator[Finding]:
    version = _version(package)
    if version is not None and version.partition("+")[0] not in tested:
        yield Finding("note", package, f"{version} is untested; tested are {', '.join(tested)}")


def _optional() -> Iterator[Finding]:
    for package, use in OPTIONAL.items():
        version = _version(package)
        yield Finding("ok" if version else "note", package, version or f"absent; for {use}")


def _plug_in() -> Iterator[Finding]:
    found = metadata.entry_points(group="lmms_eval.models")
    if any(point.name == "llava_hivtp" for point in found):
        yield Finding("ok", "plug-in", "python -m lmms_eval --model llava_hivtp")
    else:
        remedy = "pip install --no-deps -e .; `python -m eval run` does without"
        yield Finding("note", "plug-in", f"lmms-eval's own command line lacks it: {remedy}")


def _device() -> Iterator[Finding]:
    try:
        import torch
    except Exception:  # reported above
        return
    if not torch.cuda.is_available():
        yield Finding("note", "GPU", "none visible: float32 on the CPU, for tests and tiny models")
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        memory = properties.total_memory / 2**30
        level = "ok" if memory >= 16 else "note"
        text = f"{properties.name}, {memory:.0f} GiB"
        yield Finding(level, f"GPU {i}", text if level == "ok" else f"{text}: a 7B needs 16 GiB")


def _folders(data: Path, out: Path) -> Iterator[Finding]:
    missing = sorted({part.repository for part in datasets.missing(data, BENCHMARKS)})
    if missing:
        remedy = f"python -m eval prefetch CONFIG --data {data} fetches those of a table"
        yield Finding("note", "data", f"{data} lacks {', '.join(missing)}: {remedy}")
    else:
        yield Finding("ok", "data", f"{data} holds all data sets")
    place = next(folder for folder in (out, *out.resolve().parents) if folder.exists())
    free = shutil.disk_usage(place).free / 2**30
    yield Finding("ok" if free > 1 else "broken", "results", f"{out}: {free:.0f} GiB free")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
