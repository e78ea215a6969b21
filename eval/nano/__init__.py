"""A LLaVA of two million weights, the drawn world it answers about, and eight small data sets."""

from pathlib import Path

CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"
EMBEDDED = CHECKPOINTS / "nodrop"  # the default everywhere: it never saw a pruned input
