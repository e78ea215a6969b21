"""The machine at hand and the versions on it: where a number was made."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval import ROOT

if TYPE_CHECKING:
    import torch

LIBRARIES = ("torch", "transformers", "lmms_eval", "llava-torch", "datasets", "pillow", "numpy")


def provenance() -> dict[str, Any]:
    """Commit, versions, device and date of a result: listed below a table, never compared."""
    versions = {library: version(library) for library in LIBRARIES}
    return {
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            **{k: v for k, v in versions.items() if v},
        },
        "device": device_name(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def columns(device: torch.device) -> dict[str, str]:
    """What a time depends on besides the request: columns of every file of measured times."""
    import torch

    from llava_hivtp.importance import kernel_runs_on

    on_gpu = device.type == "cuda"
    return {
        "device": device_name(device),
        "cores": "" if on_gpu else str(os.cpu_count()),
        "clocks": nvidia_smi(device, _CLOCKS) if on_gpu else "",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "triton": version("triton"),
        "score": "triton" if kernel_runs_on(device) else "pytorch",
        "cudnn_attention": "off" if on_gpu else "",
        "flash_attn": version("flash-attn"),
        "commit": commit(),
    }


def device_name(device: torch.device | None = None) -> str:
    """The GPU in use, or the processor; by default a GPU if there is one."""
    import torch

    on_gpu = torch.cuda.is_available() if device is None else device.type == "cuda"
    if on_gpu:
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    names = [line.partition(":")[2].strip() for line in lines.splitlines() if "model name" in line]
    return f"CPU {names[0] if names else platform.processor() or platform.machine()}"


@cache
def version(package: str) -> str:
    """Of an installed package; empty if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


@cache
def commit() -> str:
    """The checkout's commit, with a mark if files differ from it."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=ROOT, capture_output=True, text=True, check=True, timeout=30,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "no git checkout"
    return described.stdout.strip()


_CLOCKS = "gpu=clocks.sm,clocks.mem,clocks.max.sm,power.limit,driver_version"


def nvidia_smi(device: torch.device, query: str) -> str:
    """What the driver's tool says about a GPU, its commas as semicolons; empty without it."""
    command = ["nvidia-smi", f"--query-{query}", "--format=csv,noheader"]
    command += ["-i", str(device.index or 0)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().replace(",", ";") if done.returncode == 0 else ""
