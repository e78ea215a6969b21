"""Images as people have them."""

from __future__ import annotations

import io
import time
import zlib

import numpy as np
import pytest
import torch
from llava.mm_utils import process_images
from PIL import Image

from llava_hivtp.images import open_image, prepare_images, to_rgb

DIGESTS = {
    "v15": 3160777078,
    "next": 3429183324,
}  # crc32 of the float32 pixels, measured under 4.37.2 and 5.23.0


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1", "I", "I;16", "F", "YCbCr"])
def test_every_mode_becomes_rgb(loaded, mode):
    _, _, processor = loaded("v15")
    model = loaded("v15")[0]
    image = Image.new("L", (40, 30), 100).convert(mode) if mode != "I;16" else None
    image = image or Image.fromarray(np.full((30, 40), 25600, np.uint16))
    values = np.asarray(to_rgb(image)).astype(int)
    assert values.shape == (30, 40, 3)
    if mode != "1":  # black and white has no grey
        assert abs(values - 100).max() <= 1
    pixels, sizes = prepare_images([image], processor, model.config)
    assert sizes == [(40, 30)]
    assert torch.isfinite(pixels).all()


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.array([[0, 256 * 100, 65535]], np.uint16)
    assert np.asarray(to_rgb(Image.fromarray(values)))[0, :, 0].tolist() == [0, 100, 255]


def test_floats_up_to_one_and_wide_integers_are_scaled():
    ramp = np.array([[0, 0.5, 1]], np.float32)
    assert np.asarray(to_rgb(Image.fromarray(ramp)))[0, :, 0].tolist() == [0, 127, 255]
    wide = np.array([[0, 100 * 256, 65535]], np.int32)
    assert np.asarray(to_rgb(Image.fromarray(wide)))[0, :, 0].tolist() == [0, 100, 255]


@pytest.mark.parametrize("kind", ["v15", "next"])
def test_pixels_are_equal_under_both_transformers_versions(loaded, kind):
    _, _, processor = loaded(kind)
    ramp = np.add.outer(np.arange(90) * 2, np.arange(130)) % 256
    image = Image.fromarray(np.stack([ramp, 255 - ramp, ramp[::-1]], -1).astype(np.uint8))
    pixels, _ = prepare_images([image], processor, loaded(kind)[0].config)
    assert zlib.crc32(pixels.contiguous().numpy()) == DIGESTS[kind]


def test_a_photo_held_sideways_is_turned_upright(tmp_path):
    image = Image.new("RGB", (40, 20))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg").size == (20, 40)


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (1, 50), (2000, 10), (10, 2000)])
@pytest.mark.parametrize("kind", ["v15", "next"])
def test_any_size_gives_pixels_of_three_colours(loaded, photo, kind, size):
    model, _, processor = loaded(kind)
    pixels, sizes = prepare_images([photo(size)], processor, model.config)
    assert pixels.shape[-3:] == (3, 336, 336)
    assert min(sizes[0]) >= min(size)
    assert torch.isfinite(pixels).all()


@pytest.mark.parametrize(
    "size",
    [
        (337, 100),
        (640, 480),
        (480, 640),
        (1000, 333),
        (333, 1001),
        (1200, 4),
        (4, 1200),
        (336, 900),
    ],
)
def test_padding_to_a_square_gives_the_pixels_of_llava(loaded, size):
    from llava_hivtp.limits import Limits

    model, _, processor = loaded("v15")
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    ours, _ = prepare_images([image], processor, model.config, Limits(aspect=1000))
    assert torch.equal(ours, process_images([image], processor, model.config))


def test_a_thin_image_needs_no_square_in_memory(loaded):
    """LLaVA pads 6000 x 4 to 6000 x 6000, 108 MB, and the processor copies it as float64."""
    from llava_hivtp.limits import Limits

    model, _, processor = loaded("v15")
    begun, largest = time.process_time(), []
    real = Image.new

    def new(mode, size, *rest):
        largest.append(size[0] * size[1])
        return real(mode, size, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "new", new)
        prepare_images([real("RGB", (12000, 4))], processor, model.config, Limits(aspect=10**4))
    assert max(largest) <= 336 * 12000
    assert time.process_time() - begun < 5


def test_images_that_are_none_are_refused(loaded):
    model, _, processor = loaded("v15")
    with pytest.raises(TypeError, match="image 0 must be a PIL image, got ndarray"):
        prepare_images([np.zeros((8, 8, 3), np.uint8)], processor, model.config)
    for none in ([], None, np.zeros((8, 8, 3), np.uint8), Image.new("RGB", (8, 8))):
        with pytest.raises(ValueError, match="images must be a list of PIL images"):
            prepare_images(none, processor, model.config)
    with pytest.raises(ValueError, match="image 0 is 3 x 6000 pixels; one side may be 200 times"):
        prepare_images([Image.new("RGB", (3, 6000))], processor, model.config)


def test_broken_files_are_named(tmp_path):
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "PNG")
    (tmp_path / "cut.png").write_bytes(buffer.getvalue()[:-200])
    (tmp_path / "note.png").write_text("no image")
    for name in ("cut.png", "note.png"):
        with pytest.raises(ValueError, match=f"{name} is no readable image"):
            open_image(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no image file at"):
        open_image(tmp_path / "none.png")
