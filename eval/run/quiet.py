"""How a process that evaluates behaves: offline, with one voice on the terminal."""

from __future__ import annotations

import logging
import os
import sys


def prepare_process() -> None:
    """Nothing is downloaded in a run; libraries' bars and notices stay out of its log."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    os.environ |= {"TQDM_DISABLE": "1", "LOGURU_LEVEL": "WARNING"}
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    logging.getLogger("eval").setLevel(logging.INFO)
