"""Everything that measures the library; `python -m eval` lists its verbs."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # the checkout
