"""What may be served, read from a checkpoint's configuration; the engine itself: tests/serving."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from llava_hivtp.pruners import PRUNERS, Pruner
from llava_hivtp.serving.settings import settings_of


def config(hivtp, anyres=False, **changed):
    vision = SimpleNamespace(
        model_type="clip_vision_model", num_hidden_layers=24, image_size=336, patch_size=14
    )
    given = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
    given |= {"image_grid_pinpoints": [[336, 672]]} if anyres else {}
    return SimpleNamespace(hivtp=hivtp, **{"vision_config": vision} | given | changed)


def test_without_the_key_there_is_nothing_to_do():
    assert settings_of(SimpleNamespace()) is None


def test_hivtp_is_filled_up_and_needs_no_name():
    settings = settings_of(config({"r": 2, "k": 25, "c": 2}))
    assert settings.pruner.fill
    assert settings.pruner.budget(1, 576) == 288
    assert settings.layout is None
    assert settings_of(config({}, anyres=True)).layout == "inside"


@pytest.mark.parametrize(
    ("hivtp", "changed", "message"),
    [
        ({"fill": False}, {}, "hivtp with fill=False .* turn fill round"),
        (
            {"pruner": "prumerge", "keep": 0.5, "layers": [23], "adaptive": True},
            {},
            "adaptive=True",
        ),
        ({"pruner": "hired", "keep": 0.5, "faithful": True}, {}, "faithful=True"),
        ({"pruner": "prumerge", "keep": 0.5}, {}, r"reads layer 24, .* such as layers=\[23\]"),
        ({"pruner": "fastvv"}, {}, "unknown pruner 'fastvv'; choose from"),
        (
            {"pruner": "fastv", "layers": []},
            {},
            "fastv drops tokens inside .* before it, such as hivtp",
        ),
        ({"ratio": 2}, {}, "takes no ratio; it takes"),
        ({"k": 0}, {}, "k must be a percentage"),
        ({"r": 5}, {}, "does not divide the 24 x 24 grid"),
        ({"layout": "rows"}, {}, "layout must be one of"),
        ({"weigh": True}, {}, "weigh=True: vLLM's attention takes no bias"),
        ({"layout": "unpad"}, {"anyres": True}, "unpad .* use inside or mosaic"),
        ({"pruner": "divprune", "keep": 0.5}, {"anyres": True}, "DivPrune cannot .* mosaic"),
        ("r=2", {}, "hivtp must be an object"),
        ({}, {"vision_feature_layer": [-2, -5]}, "one layer is needed"),
        ({}, {"vision_feature_select_strategy": "full"}, "'default', the patches without CLS"),
        (
            {},
            {"vision_config": SimpleNamespace(model_type="siglip_vision_model")},
            "a CLIP tower is needed, this checkpoint has siglip_vision_model",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_with_a_remedy(hivtp, changed, message):
    with pytest.raises(ValueError, match=message):
        settings_of(config(hivtp, **changed))


@pytest.mark.parametrize("name", [name for name, cls in PRUNERS.items() if cls.asks])
def test_a_method_that_asks_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} chooses by the question"):
        settings_of(config({"pruner": name, "layout": "mosaic"}, anyres=True))


def test_what_the_readme_serves_keeps_what_it_says():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (overrides,) = re.findall(r"--hf-overrides '(.+)'", readme)
    kept = settings_of(config(json.loads(overrides)["hivtp"])).pruner.budget(1, 576)
    assert f"`usage.prompt_tokens` counts {kept} tokens for the image, not 576" in readme


def test_keys_differ_as_settings_do():
    given = [{}, {"k": 24}, {"layers": [7, 8, 9]}, {"pruner": "fopru"}, {"pruner": "random"}]
    given += [{"pruner": "random", "seed": 1}]
    keys = [settings_of(config(each)).key for each in given]
    keys += [
        settings_of(config({"layout": name}, anyres=True)).key for name in ("inside", "mosaic")
    ]
    assert len(set(keys)) == len(keys)
    assert settings_of(config({"k": 25})).key == settings_of(config({})).key


@pytest.mark.parametrize("name", [name for name, cls in PRUNERS.items() if not cls.asks])
def test_every_method_is_served_under_mosaic_with_layers_that_are_loaded(name):
    layers = {"prumerge": [23], "prumerge_plus": [23]}.get(name)
    given = {"pruner": name, "layout": "mosaic", **({"layers": layers} if layers else {})}
    settings = settings_of(config(given, anyres=True))
    assert isinstance(settings.pruner, Pruner)
    assert not settings.pruner.varies_by()
