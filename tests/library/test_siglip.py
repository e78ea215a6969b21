"""Towers without CLS: LLaVA on SigLIP, and LLaVA-OneVision."""

from __future__ import annotations

import copy

import pytest
import torch
from ask import METHODS
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaProcessor,
    SiglipVisionConfig,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from eval.untrained.random_llava import byte_tokenizer
from llava_hivtp import attach, detach, load
from llava_hivtp.families.hf_onevision import ImagesOnly
from llava_hivtp.pruners import build_pruner, read_pruner

SIDE, PATCH, IMAGE = 56, 14, "<image>"
PINPOINTS = [[SIDE * h, SIDE * w] for h in (1, 2, 3) for w in (1, 2, 3)]
BLIND = [name for name, method in METHODS.items() if not method.needs_cls]
INSIDE = {name: build_pruner(name, after=1, keep=0.5) for name in ("fastv", "dart")}
READS_CLS = [name for name, method in METHODS.items() if method.needs_cls]
GREEDY = {
    "max_new_tokens": 6,
    "do_sample": False,
    "eos_token_id": None,
    "output_logits": True,
    "return_dict_in_generate": True,
}
PROMPTS = {
    "single": [("USER: <image>\nWhat? ASSISTANT:", [0])],
    "ragged": [("<image> What is this? A:", [0]), ("<image> A:", [1])],
    "two images": [("x <image><image> y", [2, 3]), ("Q <image> A:", [0])],
    "text only row": [("<image> A:", [0]), ("no image here", []), ("Q <image>", [3])],
}
SIZES = [(112, 90), (56, 56), (160, 50), (61, 120)]


@pytest.fixture(scope="module", params=["llava", "onevision"])
def made(request, tmp_path_factory):
    """(model, processor) of random weights, saved and loaded."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    vision = SiglipVisionConfig(
        **shape,
        num_hidden_layers=4,
        image_size=SIDE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([IMAGE, "<video>"], special_tokens=True)
    text = LlamaConfig(
        **shape,
        num_hidden_layers=2,
        vocab_size=len(tokenizer),
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    options = {
        "vision_config": vision,
        "text_config": text,
        "image_token_index": tokenizer.convert_tokens_to_ids(IMAGE),
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }
    square = {"height": SIDE, "width": SIDE}
    if request.param == "llava":
        model = LlavaForConditionalGeneration(LlavaConfig(**options))
        processor = LlavaProcessor(
            image_processor=SiglipImageProcessorPil(size=square),
            tokenizer=tokenizer,
            patch_size=PATCH,
            vision_feature_select_strategy="full",
        )
    else:
        options |= {"image_grid_pinpoints": PINPOINTS, "vision_aspect_ratio": "anyres_max_9"}
        video = {"video_token_index": tokenizer.convert_tokens_to_ids("<video>")}
        model = LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig(**options, **video))
        processor = ImagesOnly(
            image_processor=LlavaOnevisionImageProcessorPil(
                size=square, image_grid_pinpoints=PINPOINTS
            ),
            tokenizer=tokenizer,
            num_image_tokens=(SIDE // PATCH) ** 2,
            vision_feature_select_strategy="full",
        )
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.3)
    model.generation_config.suppress_tokens = [model.config.image_token_id]
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    model, _, processor, _ = load(folder, device_map="cpu")
    return model, processor


def ask(made, photo, asked):
    model, processor = made
    images = [photo(SIZES[i], i) for _, own in asked for i in own]
    texts = [text for text, _ in asked]
    batch = processor(text=texts, images=images, padding=True, return_tensors="pt")
    return attach(model), dict(batch)


def run(model, batch):
    return model.generate(**copy.deepcopy(batch), **GREEDY)


@pytest.mark.parametrize("pruner", ["none", "dart:after=1,keep=1.0"])
@pytest.mark.parametrize("prompts", PROMPTS)
def test_keep_all_is_stock_to_the_bit(made, photo, prompts, pruner):
    model, batch = ask(made, photo, PROMPTS[prompts])
    model.pruner = pruner if pruner == "none" else read_pruner(pruner)
    ours = run(model, batch)
    call = model(**batch).logits
    stock = run(detach(model), batch)
    assert torch.equal(ours.sequences, stock.sequences)
    assert all(map(torch.equal, ours.logits, stock.logits))
    assert torch.equal(call, model(**batch).logits)


@pytest.mark.parametrize("name", [*BLIND, *INSIDE])
def test_methods_that_need_no_cls_run_and_a_batch_is_its_rows(made, photo, name):
    alone = []
    for one in PROMPTS["ragged"]:
        model, batch = ask(made, photo, [one])
        model.pruner = (METHODS | INSIDE)[name]
        tokens = run(model, batch).sequences[0, -6:].tolist()
        alone.append((tokens, model.kept[0].kept.patch.tolist()))
    model, batch = ask(made, photo, PROMPTS["ragged"])
    model.pruner = (METHODS | INSIDE)[name]
    rows = run(model, batch).sequences[:, -6:].tolist()
    assert [(row, i.kept.patch.tolist()) for row, i in zip(rows, model.kept, strict=True)] == alone


def test_what_hivtp_reads_is_the_attention_between_patches(made, photo):
    from llava_hivtp.importance import received_attention

    model, batch = ask(made, photo, PROMPTS["single"])
    pictures = model.pictures(dict(batch))
    ((features, _),) = model.encode(pictures, (2,))
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    pixels = torch.cat([picture.pixels for picture in pictures])
    (maps,) = tower(pixels, output_attentions=True).attentions[1:2]  # (T, H, N, N)
    tower.set_attn_implementation("sdpa")
    torch.testing.assert_close(received_attention(features, (2,)), maps.mean((1, 2)))
    assert features.cls is None


@pytest.mark.parametrize("name", READS_CLS)
def test_methods_that_read_cls_are_refused_by_name(made, name):
    model, _ = made
    attach(model)
    with pytest.raises(ValueError, match=f"{type(METHODS[name]).__name__} reads the CLS token"):
        model.pruner = METHODS[name]
    assert model.pruner == METHODS["none"]


def test_what_onevision_cannot_is_refused_by_name(made, photo):
    model, batch = ask(made, photo, PROMPTS["single"])
    if not isinstance(model, LlavaOnevisionForConditionalGeneration):
        pytest.skip("LLaVA has neither tiles nor videos")
    with pytest.raises(ValueError, match="no video"):
        model(**batch, pixel_values_videos=batch["pixel_values"])
    before = model.config.vision_aspect_ratio
    model.config.vision_aspect_ratio = "anyres_max_2"
    try:
        with pytest.raises(ValueError, match="90 x 112 .height x width. fills more than anyres"):
            model(**batch)
    finally:
        model.config.vision_aspect_ratio = before
