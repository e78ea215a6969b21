"""Package `llava_hivtp`; `eval/` and `scripts/` run from a checkout."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "llava_hivtp/__init__.py").read_text())[1]

setup(
    name="llava_hivtp",
    version=VERSION,
    description="Training-free visual token pruning for LLaVA: HIVTP and its peers on equal terms",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["llava_hivtp", "llava_hivtp.*"]),
    python_requires=">=3.10",
    install_requires=["torch>=2.1", "numpy", "pillow"],
    extras_require={
        # llava-torch itself goes in with --no-deps: see third_party/README.md
        "llava": ["transformers>=4.37.2,<6", "accelerate", "sentencepiece", "protobuf", "requests"],
        # lmms-eval==0.7.3 too goes in with --no-deps: it would bring torchvision
        "eval": ["typer", "pyyaml", "matplotlib", "scipy", "datasets", "evaluate", "sacrebleu"]
        + ["aiohttp", "loguru", "openpyxl", "pytablewriter", "pytz", "tenacity"],
        "flash": ["flash-attn"],
        "deepspeed": ["deepspeed==0.19.8"],
        "train": ["transformers==4.37.2", "peft==0.12.0"],
        # The plug-in is made for this release: vLLM's model classes change with every one.
        "serve": ["vllm==0.32.0"],
        "demo": ["gradio==6.31.0", "matplotlib", "scipy", "pyarrow", "typer"],
    },
    entry_points={
        "console_scripts": ["llava-hivtp=llava_hivtp.cli:main"],
        "vllm.general_plugins": ["hivtp = llava_hivtp.serving:register"],
        "lmms_eval.models": ["llava_hivtp=llava_hivtp.lmms:manifest"],
    },
)
