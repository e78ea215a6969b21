"""What a caller hands to the model is right, or refused by name before the tower runs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import transformers
from ask import prompt_ids

from llava_hivtp import attach, build_pruner
from llava_hivtp.images import prepare_images
from llava_hivtp.pruners import Pruner, ScorePruner

ASK = "USER: <image>\nWhat? ASSISTANT:"
NAN = float("nan")


@pytest.fixture
def asked(loaded, photo):
    """Ask one image of 640x480 with inputs changed by a function; the tower must not run."""

    def ask(change, kind="next", text=ASK):
        model, tokenizer, processor = loaded(kind)
        attach(model)
        ids, _ = prompt_ids(tokenizer, text)
        pixels, sizes = prepare_images([photo((640, 480))], processor, model.config)
        pixels, sizes = change(pixels, sizes)
        ran = []
        tower = model.get_vision_tower().vision_tower
        hook = tower.register_forward_pre_hook(lambda *_: ran.append(1))
        try:
            model.generate(ids, images=pixels, image_sizes=sizes, max_new_tokens=1)
        finally:
            hook.remove()
            assert not ran

    return ask


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int64, torch.bool, torch.complex64]
)
@pytest.mark.parametrize("kind", ["v15", "next"])
def test_pixels_that_are_not_floating_point_are_refused(asked, kind, dtype):
    with pytest.raises(TypeError, match=rf"image 0 has {dtype} pixels; hand over the floating"):
        asked(lambda p, s: (p.to(dtype), s), kind)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda p, s: (p.numpy(), s), TypeError, "images must be a tensor or a list.*ndarray"),
        (lambda p, s: ([p[0].numpy()], s), TypeError, "image 0 must be a tensor.*got ndarray"),
        (lambda p, s: ([None], s), TypeError, "image 0 must be a tensor of pixels, got NoneType"),
        (lambda p, s: ("photo.jpg", s), TypeError, "images must be a tensor or a list.*got str"),
        (lambda p, s: ([p[0, 0, 0]], s), ValueError, r"image 0 has shape \(336, 336\)"),
        (lambda p, s: (p[:, :, :1], s), ValueError, r"image 0 has shape \(5, 1, 336, 336\)"),
        (lambda p, s: (p[:, :0], s), ValueError, r"image 0 has shape \(0, 3, 336, 336\)"),
        (lambda p, s: ([], s), ValueError, "there is no image; pass images=None"),
        (lambda p, s: (None, s), ValueError, "1 image marks in the prompts, but images=None"),
        (lambda p, s: (p, [(0, 480)]), ValueError, r"two numbers above 0; got \(0, 480\)"),
        (lambda p, s: (p, [(NAN, 480)]), ValueError, r"two numbers above 0; got \(nan, 480\)"),
        (lambda p, s: (p, [(640, 480, 3)]), ValueError, r"two numbers above 0; got \(640, 480, 3"),
        (lambda p, s: (p, [640]), ValueError, "two numbers above 0; got 640"),
        (lambda p, s: (p, "ab"), ValueError, "image_sizes must be a list of .width, height., got"),
        (lambda p, s: (p, 640), ValueError, "image_sizes must be a list of .width, height., got"),
    ],
)
def test_other_inputs_are_refused_by_name(asked, change, error, message):
    with pytest.raises(error, match=message):
        asked(change)


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (1000, 300), (300, 1000)])
def test_swapped_sizes_are_told_by_the_letterbox(asked, loaded, photo, size):
    model, _, processor = loaded("next")
    pixels, (right,) = prepare_images([photo(size)], processor, model.config)
    attach(model).encode_images(pixels, [right])
    with pytest.raises(ValueError, match="shows the letterbox of .* are .width, height."):
        asked(lambda *_: (pixels, [right[::-1]]))
    model.encode_images(torch.randn_like(pixels), [right[::-1]])  # noise says nothing


def test_an_image_without_a_mark_is_refused(asked):
    with pytest.raises(ValueError, match="no image mark in any prompt: put <image> where"):
        asked(lambda p, s: (p, s), text="USER: What? ASSISTANT:")


def test_arrays_of_sizes_are_taken(loaded, photo):
    model, _, processor = loaded("next")
    attach(model)
    pixels, sizes = prepare_images([photo((640, 480))], processor, model.config)
    (expected,) = model.encode_images(pixels, sizes)
    for spelled in (torch.tensor(sizes), [np.array(sizes[0])]):
        assert torch.equal(model.encode_images(pixels, spelled)[0], expected)


@pytest.mark.parametrize("aspect", ["anyres_max_9", "highres", 5])
def test_a_tiling_that_preprocessing_does_not_know_is_refused(loaded, aspect):
    model, *_ = loaded("v15")
    before = model.config.image_aspect_ratio
    model.config.image_aspect_ratio = aspect
    try:
        with pytest.raises(ValueError, match=f"image_aspect_ratio={aspect!r} is not supported"):
            attach(model)
    finally:
        model.config.image_aspect_ratio = before


@dataclass
class Greedy(ScorePruner):
    """Says a share and keeps all."""

    def select(self, features):
        return Pruner().select(features)


@dataclass
class GreedyByTile(Greedy):
    by_tile = True


@pytest.mark.parametrize("method", [Greedy, GreedyByTile])
def test_a_method_over_its_budget_is_an_error_that_names_image_and_counts(loaded, photo, method):
    model, _, processor = loaded("v15")
    attach(model, method(keep=0.25))
    pixels, sizes = prepare_images([photo((40, 40))] * 2, processor, model.config)
    with pytest.raises(
        ValueError, match=f"{method.__name__} kept 576 tokens of image 0 .*budget of 144"
    ):
        model.encode_images(pixels, sizes)


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        ("hivtp", "k", 5000, r"k must be a percentage in \(0, 100\], got 5000"),
        ("hivtp", "r", 7, "r=7 does not divide"),
        ("hivtp", "layers", (30,), "lie outside 1..24"),
        ("random", "keep", 2, r"keep must be a share in \(0, 1\], got 2"),
    ],
)
def test_a_field_changed_after_attach_is_checked_before_the_tower_runs(
    asked, loaded, monkeypatch, name, field, value, message
):
    model, *_ = loaded("next")
    pruner = build_pruner(name)

    def change(pixels, sizes):
        model.pruner = pruner
        setattr(pruner, field, value)
        return pixels, sizes

    with pytest.raises(ValueError, match=message):
        asked(change)


def test_kept_positions_go_with_the_version_of_transformers(loaded):
    model = loaded("v15")[0]
    if int(transformers.__version__.split(".")[0]) >= 5:
        assert attach(model, "none", positions="kept").positions == "kept"
        attach(model, "none")
    else:
        with pytest.raises(ValueError, match="positions='kept' needs transformers 5"):
            attach(model, "none", positions="kept")
