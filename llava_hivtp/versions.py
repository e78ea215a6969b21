"""Which generation of transformers is here."""

from __future__ import annotations

import transformers


def before_5() -> bool:
    """Whether it is LLaVA's own, 4.37, or another before 5."""
    return int(transformers.__version__.split(".")[0]) < 5
