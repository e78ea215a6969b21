"""A second device made of CPU memory, to see on any machine what code asks of a GPU.

It computes what the CPU computes. Tensors of both devices do not mix, every time the host would
wait for a GPU or hand it something is counted, and work can be recorded as in a CUDA graph.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

if torch.cuda.is_available():  # PyTorch knows one accelerator at a time
    pytest.skip("there is a GPU", allow_module_level=True)
backend = pytest.importorskip("torch.utils.backend_registration")
if not hasattr(backend, "_setup_privateuseone_for_python_backend"):
    pytest.skip("this torch takes no device written in Python", allow_module_level=True)

aten = torch.ops.aten
NUMBERS = {aten._local_scalar_dense.default, aten.equal.default}  # one goes to the host
SIZES = {  # how large the result is, only the device knows
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
    aten.bincount.default,
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class _Absent(backend._DummyBackendModule):
    """Nobody but who asks for the device by name finds one."""

    def is_available(self) -> bool:
        return False

    def device_count(self) -> int:
        return 0

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


class _Hook(backend._DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return False


backend._setup_privateuseone_for_python_backend("pretend", _Absent(), _Hook())
DEVICE = torch.device("pretend", 0)


class _There(torch.Tensor):
    """A tensor of the device; its numbers are `here`."""

    here: torch.Tensor

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> _There:
        shape = {"strides": here.stride(), "storage_offset": here.storage_offset()}
        there = cls._make_wrapper_subclass(
            cls, here.size(), **shape, dtype=here.dtype, device=DEVICE
        )
        there.here = here
        return there

    def tolist(self) -> list:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, operation: Any, *_: Any) -> None:
        raise RuntimeError(f"{operation} outside of `with Pretend()`")


def moved(model: nn.Module) -> nn.Module:
    """A copy of the model on the device."""
    conversion = torch.__future__
    before = conversion.get_overwrite_module_params_on_conversion()
    conversion.set_overwrite_module_params_on_conversion(True)
    try:
        with Pretend():
            return copy.deepcopy(model).to(DEVICE)
    finally:
        conversion.set_overwrite_module_params_on_conversion(before)


class _Literals(TorchFunctionMode):
    """Python numbers become a tensor of the CPU, which then moves: what PyTorch does inside."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.new_tensor:
            like, *args = args
            kwargs = {"dtype": like.dtype, "device": like.device} | kwargs
            function = torch.tensor
        if function is torch.tensor and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return torch.tensor(*args, **kwargs).to(device)
        return function(*args, **kwargs)


class Pretend(TorchDispatchMode):
    """While the block is open the device works, and `events` counts.

    "wait" for the device, "take" from it without waiting, "give" it something, "send" it something
    while the host goes on.
    """

    def __init__(self, largest: float = float("inf")) -> None:
        """`largest`: bytes of a tensor; for a larger one there is no memory."""
        super().__init__()
        self.largest, self.most = largest, 0  # allowed, and met so far
        self.events: Counter[str] = Counter()
        self._tape: list[tuple] | None = None  # while something is recorded
        self._literals = _Literals()

    def __enter__(self) -> Pretend:
        self._literals.__enter__()
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        self._literals.__exit__(*exception)

    def record(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """Run once; the call that comes back repeats the work in the same memory, and no Python.

        That is what a CUDA graph does, and like one it takes no work that touches the host.
        """
        before, self._tape = self.events.copy(), []
        output = run()
        tape, self._tape = self._tape, None
        if self.events != before:
            raise RuntimeError(f"the host takes part in what is recorded: {self.events - before}")

        def replay() -> Any:
            for operation, args, kwargs, outputs in tape:
                for old, new in zip(outputs, _tensors(operation(*args, **kwargs)), strict=True):
                    if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                        old.copy_(new)
            return output

        return replay

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        given = _tensors((args, kwargs))
        there = any(isinstance(x, _There) for x in given)
        if there and (operation in NUMBERS | SIZES or self._by_mask(operation, args)):
            self.events["wait"] += 1
        there &= operation not in NUMBERS
        if operation is aten.copy_.default:
            there = isinstance(args[0], _There)
            self._moved(args[1], there, kwargs.get("non_blocking"))
        elif "device" in kwargs and kwargs["device"] is not None:
            there = torch.device(kwargs["device"]).type == DEVICE.type
            if given:
                self._moved(given[0], there, kwargs.get("non_blocking"))
            kwargs["device"] = torch.device("cpu")
        elif there and any(x.ndim and not isinstance(x, _There) for x in given):
            if operation not in INDEXING:
                raise RuntimeError(f"{operation} takes tensors of two devices")
            self.events["give"] += 1
        mine = tree_map(lambda x: x.here if isinstance(x, _There) else x, (args, kwargs))
        out = operation(*mine[0], **mine[1])
        if not there:
            return out
        size = max([x.nbytes for x in _tensors(out)], default=0)
        self.most = max(self.most, size)
        if size > self.largest:
            raise torch.OutOfMemoryError("the pretended device is out of memory")
        if self._tape is not None:
            self._tape.append((operation, *mine, _tensors(out)))
        out = tree_map(lambda x: _There(x) if isinstance(x, torch.Tensor) else x, out)
        return return_and_correct_aliasing(operation, args, kwargs, out)

    def _by_mask(self, operation: Any, args: tuple) -> bool:
        indices = args[1] if operation in INDEXING else ()
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)

    def _moved(self, tensor: torch.Tensor, is_there: bool, non_blocking: bool | None) -> None:
        if not tensor.numel():  # nothing to copy
            return
        if isinstance(tensor, _There) and not is_there:
            self.events["take" if non_blocking else "wait"] += 1
        elif is_there and not isinstance(tensor, _There):
            self.events["send" if non_blocking else "give"] += 1


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
