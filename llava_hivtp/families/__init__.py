"""Families of models that can prune: one file each, found by the name of the stock class."""

from __future__ import annotations

import importlib
from typing import Any

from llava_hivtp import weighing
from llava_hivtp.families.base import Pruned, check_layout, check_positions, fitting
from llava_hivtp.families.known import FAMILIES
from llava_hivtp.pruners import Pruner


def attach(
    model: Any, pruner: Pruner | str = "none", layout: str = "unpad", positions: str = "packed"
) -> Any:
    """Let one loaded model prune; nothing else in the process changes. Returns the model.

    Hand it the image processor's float32 pixels: it casts them itself, and a seeded random choice
    then depends on neither dtype nor device. Several threads may use the model, see `model.lock`.

    Args:
        model: an instance of a class in FAMILIES or of a subclass.
        pruner: the method, or its name in PRUNERS.
        layout: how AnyRes tiles are put together. "unpad": LLaVA-NeXT's own reading order; what
            lies in the letterbox is cropped after the choice, a row that keeps a token keeps its
            newline. "inside": the same order, but the choice is among the image's patches only and
            every row keeps its newline, so the number of tokens is known before the image is seen.
            "mosaic": no unpadding, no newlines, the printed counts of the paper's Table 2.
        positions: "packed": survivors are counted as they come, as LLaVA's splice does. "kept":
            they, and the text behind, have the positions of the unpruned prompt, as they always
            do in Qwen2.5-VL and Qwen3-VL.

    Raises:
        TypeError: if the model belongs to no family.
        ValueError: if its tower, the pruner's settings or the layout are not supported.
    """
    stock = type(model).stock if isinstance(model, Pruned) else type(model)
    family = family_of(stock)
    check_layout(layout, family.layouts)
    family.check_model(model)
    check_positions(positions, model)
    pruner = fitting(pruner, family.tower_of(model), model)
    if not isinstance(model, Pruned):
        model.__class__ = pruned_class(stock)
    model._pruner, model.layout, model.positions = pruner, layout, positions
    return model


def detach(model: Any) -> Any:
    """Give the model its own class back. Returns the model."""
    if isinstance(model, Pruned):
        for name in ("_pruner", "layout", "positions", "decode", "_lock", "_local"):
            vars(model).pop(name, None)
        weighing.forget(model.get_decoder())
        model.__class__ = type(model).stock
    return model


def family_of(stock: type) -> type[Pruned]:
    """The mixin that prunes a stock class."""
    for base in stock.__mro__:
        if base.__name__ in FAMILIES:
            module, _, name = FAMILIES[base.__name__].partition(":")
            return getattr(importlib.import_module(module), name)
    raise TypeError(
        f"{stock.__name__} belongs to no family of models that can be pruned; "
        f"supported are {', '.join(FAMILIES)} and what inherits from them"
    )


def pruned_class(stock: type) -> type[Pruned]:
    """The class that prunes a stock class, made on first use where none has a name of its own."""
    family = family_of(stock)
    if stock not in Pruned.classes:
        own = {"__module__": stock.__module__, "__reduce_ex__": _by_stock_class, "stock": stock}
        type(f"Pruned{stock.__name__}", (family, stock), own)
    return Pruned.classes[stock]


def _by_stock_class(model: Pruned, protocol: int) -> tuple:
    """Pickle by the stock class, which can be imported; the one that `attach` made can not."""
    return _unpickled, (model.stock,), model.__getstate__()


def _unpickled(stock: type) -> Pruned:
    cls = pruned_class(stock)
    return cls.__new__(cls)
