"""What the library asks of a device that is not the CPU, and how often the host waits for it."""

from __future__ import annotations

import pytest
import torch
from ask import prompt_ids
from pretend import DEVICE, Pretend, moved

from llava_hivtp import PRUNERS, attach, build_pruner, detach, load
from llava_hivtp.answer import Request, prepare_batch
from llava_hivtp.images import prepare_images
from llava_hivtp.model import PrunedLlava

ASK = "USER: <image>\nWhat? ASSISTANT:"
SIZES = [(640, 480), (1000, 300)]
METHODS = {name: {"keep": 0.25} for name in PRUNERS} | {"none": {}, "hivtp": {"k": 14, "c": 3}}


@pytest.fixture(scope="module")
def llavas(checkpoints):
    """(model, tokenizer, image_processor) by kind, on the CPU and on the other device."""
    made = {}

    def get(kind):
        if kind not in made:
            here = load(checkpoints(kind), device_map="cpu")[:3]
            tower = here[0].get_vision_tower().vision_tower
            tower.config._attn_implementation = "eager"  # written out: the same sums everywhere
            made[kind] = here, (moved(here[0]), *here[1:])
        return made[kind]

    return get


def splice(llava, images, device):
    """Embeddings of one question about each image, prepared on the CPU."""
    model, tokenizer, processor = llava
    pixels, sizes = prepare_images(images, processor, model.config)
    if not isinstance(model, PrunedLlava):  # stock LLaVA does not move them itself
        pixels = [tiles.to(device) for tiles in pixels]
        pixels = torch.stack(pixels) if pixels[0].ndim == 3 else pixels
    ids = prompt_ids(tokenizer, ASK)[0].repeat(len(images), 1).to(device)
    with torch.no_grad():
        return model.prepare_inputs_labels_for_multimodal(
            ids, None, None, None, None, pixels, sizes
        )[4]


@pytest.mark.parametrize("kind", ["v15", "next"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_works_on_any_device(llavas, photo, kind, name):
    images = [photo(size, i) for i, size in enumerate(SIZES)]
    (here, there), pruner = llavas(kind), build_pruner(name, **METHODS[name])
    attach(here[0], pruner)
    attach(there[0], pruner)
    expected = splice(here, images, "cpu")
    with Pretend():
        found = splice(there, images, DEVICE)
        assert found.device == DEVICE
        assert torch.equal(found.cpu(), expected)
    for ours, theirs in zip(there[0].kept, here[0].kept, strict=True):
        assert (ours.patches, ours.newlines) == (theirs.patches, theirs.newlines)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize(
    ("kind", "layout", "arguments", "expected"),
    [
        ("v15", "unpad", {}, lambda images: 1),  # how many it kept
        ("v15", "unpad", {"fill": True}, lambda images: 0),
        ("next", "unpad", {}, lambda images: 1),
        ("next", "mosaic", {}, lambda images: 1),
        ("next", "unpad", {"fill": True}, lambda images: images),  # which rows break, per image
        ("next", "mosaic", {"fill": True}, lambda images: 0),
    ],
)
def test_hivtp_is_waited_for_once_or_never(
    llavas, photo, kind, layout, arguments, expected, images
):
    llava, pictures = llavas(kind)[1], [photo(size, i) for i, size in enumerate(SIZES[:images])]
    with Pretend() as stock:
        detach(llava[0])
        splice(llava, pictures, DEVICE)
    with Pretend() as ours:
        attach(llava[0], build_pruner("hivtp", **arguments), layout)
        splice(llava, pictures, DEVICE)
    # Two more are cheap: the marks are counted before there is anything to wait for, the check for
    # NaN is read behind LLaVA's own splice (on CUDA its answer has been under way since the tower).
    assert ours.events["wait"] - stock.events["wait"] - 2 == expected(images)


@pytest.mark.parametrize("kind", ["v15", "next"])
def test_pixels_are_pinned_ahead_and_sent_while_the_host_goes_on(llavas, photo, kind, monkeypatch):
    """On the pretended device, which has no page-locked memory: who asks for it is noted."""
    model, tokenizer, _ = llavas(kind)[1]
    attach(model, build_pruner("hivtp"))
    pinned = []
    monkeypatch.setattr("llava_hivtp.answer.PINS", (DEVICE.type,))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    requests = [Request(ASK, {}, (photo(size, i),)) for i, size in enumerate(SIZES)]
    given = prepare_batch(model, tokenizer, requests, "vicuna_v1").given
    pixels = [given["images"]] if kind == "v15" else [*given["images"]]
    for tensor in (given["inputs"], given["attention_mask"], *pixels):
        assert any(tensor.data_ptr() == each.data_ptr() for each in pinned)
    with Pretend() as there:
        model.encode(model._pictures(given["images"], given["image_sizes"]), ())
    assert there.events["send"] == len(SIZES)
    assert there.events["give"] == there.events["wait"] == 0
