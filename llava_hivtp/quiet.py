"""What commands keep transformers from printing: they show something else."""

from __future__ import annotations


def quieten() -> None:
    """Say nothing of how weights are read. To be called before LLaVA is imported."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
