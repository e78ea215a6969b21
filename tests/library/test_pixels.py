"""Pixels are LLaVA's own, to the bit, whatever the image, the aspect mode and the processor."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from llava.mm_utils import process_images
from PIL import Image

from eval.untrained.models import PINPOINTS, image_processor
from llava_hivtp import pixels
from llava_hivtp.images import open_image, prepare_images, to_rgb

SIDE = 56
SIZES = [(56, 56), (57, 55), (640, 480), (90, 130), (400, 90), (60, 500), (8, 4), (4, 300)]
MODES = ["pad", "anyres", None, "square"]


@pytest.fixture(scope="module")
def processor():
    return image_processor(SIDE)


@pytest.fixture
def no_detour(monkeypatch):
    """LLaVA's own way is closed: what comes back was made here."""

    def closed(*_):
        raise AssertionError("left to LLaVA")

    monkeypatch.setattr(pixels, "process_images", closed)


def config(mode, pinpoints=None):
    grid = pinpoints or [[w * SIDE, h * SIDE] for w, h in PINPOINTS]
    return SimpleNamespace(image_aspect_ratio=mode, image_grid_pinpoints=grid)


def equal(ours, theirs):
    if isinstance(theirs, list):
        assert isinstance(ours, list)
        assert len(ours) == len(theirs)
        return all(map(equal, ours, theirs))
    assert ours.dtype == theirs.dtype
    return ours.shape == theirs.shape and torch.equal(ours, theirs)


@pytest.mark.usefixtures("no_detour")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", SIZES)
def test_one_image(processor, photo, mode, size):
    image = photo(size)
    assert equal(
        pixels.pixel_values([image], processor, config(mode)),
        process_images([image], processor, config(mode)),
    )


@pytest.mark.usefixtures("no_detour")
@pytest.mark.parametrize("mode", MODES)
def test_images_of_different_tile_counts_and_of_equal_ones(processor, photo, mode):
    different = [photo(size, seed=i) for i, size in enumerate(SIZES)]
    for images in (different, [different[2]] * 3, [different[4], different[0]]):
        assert equal(
            pixels.pixel_values(images, processor, config(mode)),
            process_images(images, processor, config(mode)),
        )


@pytest.mark.usefixtures("no_detour")
def test_a_grid_spelled_as_text_and_one_that_no_tile_divides(processor, photo):
    for grid in (str([[112, 56], [56, 112]]), [[100, 70], [70, 150]]):
        for size in SIZES:
            assert equal(
                pixels.pixel_values([photo(size)], processor, config("anyres", grid)),
                process_images([photo(size)], processor, config("anyres", grid)),
            )


@pytest.mark.usefixtures("no_detour")
@pytest.mark.parametrize("kind", ["v15", "next"])
def test_the_processor_of_a_loaded_model(loaded, photo, kind):
    model, _, processor = loaded(kind)
    image = photo((300, 200))
    found, _ = prepare_images([image], processor, model.config)
    assert equal(found, process_images([image], processor, model.config))


@pytest.mark.parametrize(
    "changed",
    [
        {"do_normalize": False},
        {"do_rescale": False},
        {"do_center_crop": False},
        {"resample": Image.Resampling.BILINEAR},
        {"size": {"height": SIDE, "width": SIDE}},
        {"crop_size": {"height": 40, "width": 56}},
        {"rescale_factor": 0.0039},  # of no whole divisor: other bits
        {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.3, 0.2, 0.1]},
        {"rescale_factor": 1 / 127.5},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_another_processor_is_obeyed(photo, changed):
    processor = image_processor(SIDE)
    for name, value in changed.items():
        setattr(processor, name, value)
    for mode in ("pad", None):
        image = photo((200, 120))
        assert equal(
            pixels.pixel_values([image], processor, config(mode)),
            process_images([image], processor, config(mode)),
        )


def test_a_processor_that_changes_is_asked_again(photo):
    processor = image_processor(SIDE)
    before = pixels.pixel_values([photo((60, 60))], processor, config("pad"))
    processor.image_mean = [0.1, 0.2, 0.3]
    after = pixels.pixel_values([photo((60, 60))], processor, config("pad"))
    assert not torch.equal(before, after)
    assert torch.equal(after, process_images([photo((60, 60))], processor, config("pad")))


def test_an_image_in_memory_is_not_copied_and_a_file_is_read_while_open(tmp_path, photo):
    image = photo((60, 40))
    assert to_rgb(image) is image
    image.save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png")), np.asarray(image))


def test_an_image_in_memory_that_lies_on_its_side_is_turned(photo):
    image = photo((60, 40))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    image.info["exif"] = exif.tobytes()
    assert to_rgb(image).size == (40, 60)
