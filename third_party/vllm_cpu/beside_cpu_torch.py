"""Lets vLLM start beside a CPU torch; installed by `install.py`, imported when Python starts.

vLLM imports torchvision, whose wheel is built for CUDA: beside a CPU torch its import fails for
want of two operators that nobody calls. They are declared just before it is imported.
"""

from __future__ import annotations

import importlib.abc
import sys


class _Declare(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Find nothing: only take note that torchvision is about to be imported."""
        if name != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        if torch.version.cuda is None:
            for operator in ("nms", "qnms"):
                schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                torch.library.define(f"torchvision::{operator}", schema)


sys.meta_path.insert(0, _Declare())
