"""Rows of a batch, images of a prompt and models of a process do not see each other."""

from __future__ import annotations

import copy
from itertools import permutations

import pytest
import torch
from ask import embed, generate, prompt_ids
from llava.mm_utils import get_anyres_image_grid_shape
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

from llava_hivtp import PRUNERS, attach, build_pruner, detach
from llava_hivtp.anyres import inside
from llava_hivtp.images import prepare_images
from llava_hivtp.model import unpadded
from llava_hivtp.pruners import Pruner

ASK = [
    "USER: <image>\nWhat? ASSISTANT:",
    "USER: <image>\nWhich colour has it? ASSISTANT:",
    "<image>!",
]
SIZES = {"v15": [(336, 336), (640, 200), (50, 90)], "next": [(640, 480), (1000, 300), (90, 50)]}


class RuntimeErrorPruner(Pruner):
    def check(self, n_layers, n_patches):
        raise RuntimeError("no")


@pytest.fixture
def pruned(loaded):
    def get(kind, **arguments):
        model, *rest = loaded(kind)
        return attach(model, build_pruner("hivtp", **arguments)), *rest

    return get


@pytest.mark.parametrize("kind", ["v15", "next", "mistral"])
def test_a_batch_answers_like_single_requests(pruned, photo, kind):
    llava = pruned(kind, k=14, c=3)
    images = [photo(size, i) for i, size in enumerate(SIZES.get(kind, SIZES["next"]))]
    alone, kept = [], []
    for image, text in zip(images, ASK, strict=True):
        alone += generate(*llava, [image], text)
        kept += [llava[0].kept[0].kept.patch]
    for order in list(permutations(range(3)))[:3]:
        together = generate(*llava, [images[i] for i in order], *[ASK[i] for i in order])
        assert together == [alone[i] for i in order]
        for place, i in enumerate(order):
            assert torch.equal(llava[0].kept[place].kept.patch, kept[i])


def test_ragged_rows_without_a_mask_get_one(pruned, photo):
    model, tokenizer, processor = pruned("v15", k=50)
    images = [photo((336, 336)), photo((640, 200))]
    ids, _ = prompt_ids(tokenizer, ASK[0], ASK[0])
    pixels, sizes = prepare_images(images, processor, model.config)
    _, _, mask, _, embeds, _ = model.prepare_inputs_labels_for_multimodal(
        ids, None, None, None, None, pixels, sizes
    )
    lengths = [image.patches + ids.shape[1] - 1 for image in model.kept]
    assert lengths[0] != lengths[1]
    assert mask.sum(1).tolist() == lengths
    assert mask[:, -1].all()  # padded in front
    assert embeds.shape[1] == max(lengths)


def test_generation_leaves_the_padding_side_of_the_checkpoint(pruned, photo):
    llava = pruned("v15")
    generate(*llava, [photo((336, 336))], ASK[0])
    assert llava[0].config.tokenizer_padding_side == "right"


def test_rows_without_an_image_and_beams(pruned, photo):
    llava = pruned("v15")
    images = [photo((336, 336)), photo((40, 40))]
    rows = generate(*llava, images, ASK[0], "USER: Hello ASSISTANT:", num_beams=2)
    assert rows[0] == generate(*llava, images[:1], ASK[0], num_beams=2)[0]
    assert len(rows) == 2


def test_a_row_without_an_image_needs_none(pruned, photo):
    llava = pruned("v15")
    image, text = photo((336, 336)), "USER: Hello ASSISTANT:"
    with_dummy = generate(*llava, [photo((9, 9)), image], text, ASK[0])
    assert generate(*llava, [image], text, ASK[0]) == with_dummy
    assert with_dummy[0] == generate(*llava, None, text)[0]
    with pytest.raises(ValueError, match="3 images for 1 image marks"):
        generate(*llava, [image] * 3, text, ASK[0])


def test_v15_needs_no_image_sizes(pruned, photo):
    model, tokenizer, processor = pruned("v15")
    pixels, _ = prepare_images([photo((336, 336))], processor, model.config)
    ids, _ = prompt_ids(tokenizer, ASK[0])
    for sizes in (None, [(1, 1), (2, 2)]):
        assert model.generate(ids, images=pixels, image_sizes=sizes, max_new_tokens=1).numel()


METHODS = {name: {} for name in PRUNERS} | {
    name: {"keep": 0.25} for name in PRUNERS if "keep" in PRUNERS[name].__dataclass_fields__
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ["v15", "next"])
def test_every_method_runs_in_the_model_and_ignores_its_neighbours(loaded, photo, kind, name):
    model, _, processor = loaded(kind)
    attach(model, build_pruner(name, **METHODS[name]))
    images = [photo(size, i) for i, size in enumerate(SIZES[kind][:2])]
    questions = [torch.arange(9, 14), torch.arange(40, 60)]
    together = model.encode_images(*prepare_images(images, processor, model.config), questions)
    for place, image in enumerate(images):
        kept, own = model.kept[place].kept, questions[place : place + 1]
        (alone,) = model.encode_images(*prepare_images([image], processor, model.config), own)
        assert torch.equal(model.kept[0].kept.patch, kept.patch)
        torch.testing.assert_close(alone, together[place], rtol=1e-3, atol=1e-3)
        if kind == "v15" and "keep" in METHODS[name]:
            assert len(kept) <= 144
        model.encode_images(*prepare_images(images, processor, model.config), questions)


def test_a_random_choice_does_not_depend_on_the_dtype(loaded, photo):
    model, _, processor = loaded("v15")
    half = attach(copy.deepcopy(detach(model)).to(torch.bfloat16), build_pruner("random", keep=0.1))
    attach(model, build_pruner("random", keep=0.1))
    pixels, _ = prepare_images([photo((336, 336)), photo((90, 40))], processor, model.config)
    model.encode_images(pixels)
    half.encode_images(pixels)
    for ours, theirs in zip(model.kept, half.kept, strict=True):
        assert torch.equal(ours.kept.patch, theirs.kept.patch)
    assert not torch.equal(model.kept[0].kept.patch, model.kept[1].kept.patch)


def test_two_images_in_a_prompt_are_counted_apart(pruned, photo):
    llava = pruned("next")
    embeds, _ = embed(*llava, [photo((640, 480)), photo((300, 300))], "<image> or <image>?")
    first, second = llava[0].kept
    assert first.total == 2304
    assert second.total == 1152
    text = len(" or ?") + 1
    assert embeds.shape[1] == text + sum(i.patches + i.newlines for i in (first, second))


def test_training_still_pads_on_the_right_and_reaches_the_projector(pruned, photo):
    model, tokenizer, processor = pruned("v15")
    ids, mask = prompt_ids(tokenizer, ASK[0], ASK[1])
    pixels, sizes = prepare_images([photo((336, 336))] * 2, processor, model.config)
    loss = model(ids, mask, labels=ids.clamp(min=0), images=pixels, image_sizes=sizes).loss
    loss.backward()
    grads = [p.grad for p in model.get_model().mm_projector.parameters()]
    model.zero_grad(set_to_none=True)
    assert all(grad.abs().sum() > 0 for grad in grads)


def test_two_models_with_two_methods_and_a_swap(loaded, photo):
    model, *rest = loaded("v15")
    twin = attach(copy.deepcopy(detach(model)), build_pruner("hivtp", k=50))
    attach(model, build_pruner("hivtp", k=14, c=3))
    images = [photo((336, 336))]
    few = generate(model, *rest, images, ASK[0])
    many = generate(twin, *rest, images, ASK[0])
    assert len(model.kept[0].kept) <= 144 < 360 <= len(twin.kept[0].kept)
    model.pruner, twin.pruner = twin.pruner, model.pruner
    assert generate(model, *rest, images, ASK[0]) == many
    assert generate(twin, *rest, images, ASK[0]) == few


def test_detach_gives_the_stock_class_back(loaded):
    model = loaded("v15")[0]
    attach(model, "hivtp")
    assert detach(model) is model
    assert type(model) is LlavaLlamaForCausalLM
    assert not {"_pruner", "layout", "_lock", "_local"} & set(vars(model))
    assert detach(model) is model
    attach(model)


def test_a_refused_pruner_leaves_the_model_as_it_was(loaded):
    model = detach(loaded("v15")[0])
    with pytest.raises(ValueError, match="r=5 does not divide"):
        attach(model, build_pruner("hivtp", r=5))
    assert type(model) is LlavaLlamaForCausalLM
    for wrong, error in ((None, TypeError), (RuntimeErrorPruner(), RuntimeError)):
        with pytest.raises(error):
            attach(model, wrong)
        assert type(model) is LlavaLlamaForCausalLM
    attach(model, "hivtp")
    before = model.pruner
    with pytest.raises(ValueError, match="lie outside"):
        model.pruner = build_pruner("hivtp", layers=(25,))
    assert model.pruner is before


def test_mosaic_layout_counts_patches_only(pruned, photo):
    llava = pruned("next")
    llava[0].layout = "mosaic"
    embed(*llava, [photo((640, 480))], ASK[0])
    image = llava[0].kept[0]
    llava[0].layout = "unpad"
    assert image.total == 5 * 576
    assert image.newlines == 0
    assert image.patches == len(image.kept)


def test_inside_reads_as_unpad_but_its_length_is_known_before(pruned, photo):
    llava = pruned("next")
    model, most = llava[0], 144
    pixels, sizes = prepare_images(
        [photo(size) for size in [(640, 480), (900, 200), (336, 336)]], llava[2], model.config
    )
    model.pruner = "none"
    stock = model.encode_images(pixels, sizes)
    model.layout = "inside"
    assert all(map(torch.equal, model.encode_images(pixels, sizes), stock))
    model.pruner = build_pruner("hivtp", k=25, c=None, fill=True)
    for sequence, image, tiles, size in zip(
        model.encode_images(pixels, sizes), model.kept, pixels, sizes, strict=True
    ):
        grid = get_anyres_image_grid_shape(size, model.config.image_grid_pinpoints, 336)
        frame = unpadded(24, grid, size)
        shown = inside(24, grid, frame)
        assert shown[image.kept.tile, image.kept.patch].all()
        assert len(shown) == len(tiles)
        assert image.newlines == frame[0]
        assert len(sequence) == int(shown.sum(1).clamp(max=most).sum()) + frame[0]
    model.layout = "unpad"


def test_encode_images_prunes_plain_pixels(pruned, photo):
    model, _, processor = pruned("v15")
    pixels, _ = prepare_images([photo((336, 336)), photo((40, 40))], processor, model.config)
    sequences = model.encode_images(pixels)
    assert [len(sequence) for sequence in sequences] == [image.patches for image in model.kept]
    assert all(252 <= len(sequence) <= 288 for sequence in sequences)


@pytest.mark.parametrize("kind", ["v15", "next"])
def test_a_batch_is_chosen_from_at_once_and_a_subclass_image_by_image(loaded, photo, kind):
    class Counting(PRUNERS["hivtp"]):
        def select(self, features):
            calls.append((features.n_tiles, features.tile_grid))
            return super().select(features)

    class AtOnce(Counting):
        by_tile = True

    model, _, processor = loaded(kind)
    images = [photo(size, i) for i, size in enumerate(SIZES[kind])]
    pixels = prepare_images(images, processor, model.config)
    chosen = []
    for pruner, expected in (
        (Counting(), {"v15": [1, 1, 1], "next": [5, 4, 3]}),
        (AtOnce(), {"v15": [3], "next": [12]}),
    ):
        calls = []
        attach(model, pruner).encode_images(*pixels)
        assert [tiles for tiles, _ in calls] == expected[kind]
        chosen.append([image.kept for image in model.kept])
    for alone, together in zip(*chosen, strict=True):
        assert torch.equal(alone.tokens, together.tokens)
        assert torch.equal(alone.tile, together.tile)
        assert torch.equal(alone.patch, together.patch)


@pytest.mark.parametrize("name", ["none", "hivtp"])
def test_the_image_with_a_nan_is_named_in_a_batch(loaded, photo, name):
    model, _, processor = loaded("next")
    attach(model, name)
    images = [photo(size, i) for i, size in enumerate(SIZES["next"])]
    pixels, sizes = prepare_images(images, processor, model.config)
    pixels[1] = pixels[1].clone()
    pixels[1][-1, 0, 5, 5] = torch.nan
    with pytest.raises(ValueError, match="image 1 gives NaN"):
        model.encode_images(pixels, sizes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_takes_float32_pixels(loaded, photo, dtype):
    model, *rest = loaded("v15")
    half = attach(copy.deepcopy(detach(model)).to(dtype), "hivtp")
    attach(model)
    (tokens,) = generate(half, *rest, [photo((336, 336))], ASK[0])
    assert tokens
    assert half.kept[0].tokens.dtype == dtype


@pytest.mark.parametrize("layers", [(), 8, "8", (7.5, 8), [23]])
@pytest.mark.parametrize("name", ["hivtp", "fopru", "prumerge", "hired"])
def test_layers_that_are_none_are_refused(loaded, name, layers):
    model = loaded("v15")[0]
    with pytest.raises(ValueError, match="layer"):
        model.pruner = PRUNERS[name](layers=layers)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda m, p, s: (p, None), "image_sizes is missing"),
        (lambda m, p, s: (p, s * 2), "2 image_sizes for 1 images"),
        (lambda m, p, s: (p[:, :3], s), "image 0 of size .* has 3 tiles; its grid of 2 x 2"),
        (lambda m, p, s: (p * float("nan"), s), "image 0 gives NaN"),
        (lambda m, p, s: (p[0, 0], s), "4 or 5 dimensions"),
    ],
)
def test_bad_pixels_are_refused(pruned, photo, break_it, message):
    model, tokenizer, processor = pruned("next")
    pixels, sizes = prepare_images([photo((640, 480))], processor, model.config)
    pixels, sizes = break_it(model, pixels, sizes)
    ids, _ = prompt_ids(tokenizer, ASK[0])
    with pytest.raises(ValueError, match=message):
        model.generate(ids, images=pixels, image_sizes=sizes, max_new_tokens=2)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("image_aspect_ratio", "anyres_max_9", "'anyres_max_9' with tiles"),
        ("mm_patch_merge_type", "spatial_maxpool2x2", "'spatial_maxpool2x2' is not supported"),
    ],
)
def test_other_tilings_are_refused_by_name(pruned, photo, name, value, message):
    model, tokenizer, processor = pruned("next")
    pixels, sizes = prepare_images([photo((640, 480))], processor, model.config)
    ids, _ = prompt_ids(tokenizer, ASK[0])
    before = getattr(model.config, name)
    setattr(model.config, name, value)
    try:
        with pytest.raises(ValueError, match=message):
            model.generate(ids, images=pixels, image_sizes=sizes, max_new_tokens=2)
    finally:
        setattr(model.config, name, before)


def test_other_towers_are_refused_by_name(loaded):
    model = detach(loaded("v15")[0])
    tower = model.get_vision_tower()
    for name, value in (("select_feature", "cls_patch"), ("select_layer", -5)):
        before = getattr(tower, name)
        setattr(tower, name, value)
        try:
            with pytest.raises(ValueError, match=str(value)):
                attach(model)
        finally:
            setattr(tower, name, before)

    class CLIPVisionTowerS2(type(tower)):
        pass

    tower.__class__ = CLIPVisionTowerS2
    try:
        with pytest.raises(ValueError, match="CLIPVisionTowerS2 is not supported"):
            attach(model)
    finally:
        tower.__class__ = CLIPVisionTowerS2.__bases__[0]
    with pytest.raises(TypeError, match="Linear belongs to no family"):
        attach(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="layout must be one of"):
        attach(model, layout="tiles")
    attach(model)
