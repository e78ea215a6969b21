"""What `--hf-overrides '{"hivtp": {...}}'` says, and what cannot be served."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from llava_hivtp import __version__
from llava_hivtp.anyres import LAYOUTS, inside
from llava_hivtp.pruners import LayerPruner, Pruner, build_pruner, find_pruner


@dataclass(frozen=True)
class Settings:
    """A method whose number of kept tokens is known before an image is seen."""

    pruner: Pruner
    layout: str | None  # of AnyRes tiles; LLaVA-1.5 has one tile and no layout

    @property
    def key(self) -> str:
        """Names method, arguments and layout in cache keys: other settings, other image tokens."""
        cls = type(self.pruner)
        named = [cls.__module__, cls.__qualname__, asdict(self.pruner), self.layout, __version__]
        return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:16]


def settings_of(config: Any) -> Settings | None:
    """Read `config.hivtp`; None without it.

    Args:
        config: a LlavaConfig or LlavaNextConfig of transformers. Its `hivtp` holds `pruner` (a name
            in PRUNERS or "package.module:Class", default hivtp), `layout` of AnyRes tiles (default
            inside) and the arguments of the method. `fill` of hivtp is true here unless given.

    Raises:
        ValueError: if the method does not fit the tower, or keeps a number of tokens that only the
            image tells: vLLM makes room for them before it looks at the image.
    """
    given = getattr(config, "hivtp", None)
    if given is None:
        return None
    if not isinstance(given, dict):
        raise ValueError(f'hivtp must be an object such as {{"r": 2, "k": 25, "c": 2}}: {given!r}')
    arguments = dict(given)
    layout = arguments.pop("layout", "inside")
    name = arguments.pop("pruner", "hivtp")
    if name == "hivtp":
        arguments.setdefault("fill", True)
    if issubclass(find_pruner(name), LayerPruner):
        raise ValueError(
            f"{name} drops tokens inside the language model, where vLLM keeps one length for all "
            "layers: choose a method before it, such as hivtp"
        )
    pruner = build_pruner(name, **arguments)
    _check_tower(pruner, name, config)
    if pruner.asks:
        raise ValueError(f"{name} chooses by the question, which vLLM's vision tower is not told")
    if pruner.calibrated:
        raise ValueError(f"{name} keeps as many tokens as an image asks for: vLLM cannot make room")
    if pruner.weigh:
        raise ValueError(f"{name} with weigh=True: vLLM's attention takes no bias; leave it out")
    if setting := pruner.varies_by():
        raise ValueError(
            f"{name} with {setting} keeps a number of tokens that only the image tells, but vLLM "
            f"makes room for them before it looks: turn {setting.partition('=')[0]} round"
        )
    return Settings(pruner, _layout(layout, pruner, config))


def room_for(
    pruner: Pruner, n: int, tile_grid: tuple[int, int], frame: tuple[int, int] | None
) -> int:
    """How many tokens of an image stay, row breaks aside; of what `frame` shows, if given."""
    columns, rows = tile_grid
    if frame is None:
        return pruner.budget(1 + columns * rows, n * n)
    shown = inside(n, tile_grid, frame).sum(1)
    return int(shown.clamp(max=pruner.budget(1, n * n)).sum())


def _layout(layout: str, pruner: Pruner, config: Any) -> str | None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    if not hasattr(config, "image_grid_pinpoints"):
        return None
    if layout == "unpad":
        raise ValueError(
            "layout unpad crops after choosing, so only the image tells the number of tokens, but "
            "vLLM makes room for them before it looks: use inside or mosaic"
        )
    if layout == "inside" and not pruner.chooses_inside:
        raise ValueError(
            f"{type(pruner).__name__} cannot choose inside the image only: use layout mosaic"
        )
    return layout


def _check_tower(pruner: Pruner, name: str, config: Any) -> None:
    vision, layer = config.vision_config, config.vision_feature_layer
    if vision.model_type != "clip_vision_model":
        raise ValueError(f"a CLIP tower is needed, this checkpoint has {vision.model_type}")
    if not isinstance(layer, int):
        raise ValueError(f"vision_feature_layer={layer}: one layer is needed")
    if config.vision_feature_select_strategy != "default":
        raise ValueError(
            f"vision_feature_select_strategy={config.vision_feature_select_strategy!r}: only "
            "'default', the patches without CLS, is supported"
        )
    depth = vision.num_hidden_layers
    pruner.check(depth, (vision.image_size // vision.patch_size) ** 2)
    loaded = layer if layer >= 0 else depth + 1 + layer
    if pruner.layers and max(pruner.layers) > loaded:
        raise ValueError(
            f"{name} reads layer {max(pruner.layers)}, but of {depth} layers vLLM loads only the "
            f"{loaded} that this checkpoint needs: name lower ones, such as layers=[{loaded}]"
        )
