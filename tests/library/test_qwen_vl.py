"""Qwen2.5-VL and Qwen3-VL of transformers: grids of any shape, positions in 3-D."""

from __future__ import annotations

import copy
from fractions import Fraction

import pytest
import torch
from ask import METHODS
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl import modeling_qwen3_vl

from eval.untrained.random_llava import byte_tokenizer
from llava_hivtp import attach, build_pruner, detach, load
from llava_hivtp.answer import answer
from llava_hivtp.families import hf_qwen2_5_vl, hf_qwen3_vl
from llava_hivtp.importance import HEAD, column_means_in_pytorch, received_attention
from llava_hivtp.pruners import for_depth
from llava_hivtp.pruners.fopru import FoPru
from llava_hivtp.pruners.hivtp import HIVTP

EVERYWHERE, WORDS = (2, 4, 6, 8), ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>")
MARK = "<|vision_start|><|image_pad|>"
KINDS = {
    "2.5": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, hf_qwen2_5_vl.ImagesOnly),
    "3": (Qwen3VLConfig, Qwen3VLForConditionalGeneration, hf_qwen3_vl.ImagesOnly),
}
MODULES = {"2.5": modeling_qwen2_5_vl, "3": modeling_qwen3_vl}
WINDOWS = {"window_size": 56, "fullatt_block_indexes": [layer - 1 for layer in EVERYWHERE]}
DEEPSTACK = {"deepstack_visual_indexes": [1, 4], "num_position_embeddings": 36}
SIZES = [(336, 224), (112, 168), (196, 140), (84, 252)]  # grids of tokens 8x12, 6x4, 5x7, 9x3
CHAT = (
    "{% for part in messages[0]['content'] %}{% if part['type'] == 'image' %}"
    + MARK
    + "<|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %} A:"
)
PROMPTS = {
    "single": [(f"USER: {MARK}\nWhat? ASSISTANT:", [0])],
    "ragged": [(f"{MARK} What is this? A:", [0]), (f"{MARK} A:", [1])],
    "two images": [(f"x {MARK}{MARK} y", [2, 3]), (f"Q {MARK} A:", [0])],
    "text only row": [(f"{MARK} A:", [0]), ("no image here", []), (f"Q {MARK}?", [3])],
}
WAYS = [{}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}]
SQUARE = ["avgpool"]
RUN = [n for n, method in METHODS.items() if not method.needs_cls and n not in SQUARE]
HIVTP_AT = {"layers": (4,), "r": 2, "k": 25, "c": 2}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def made(kind, tmp_path_factory):
    """(model, processor) of random weights, saved and loaded."""
    settings, cls, images_only = KINDS[kind]
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([*WORDS, "<|vision_end|>"], special_tokens=True)
    image, video, start = (tokenizer.convert_tokens_to_ids(word) for word in WORDS)
    shape = {"hidden_size": 32, "intermediate_size": 64}
    config = settings(
        vision_config=shape
        | {"depth": 8, "num_heads": 4, "patch_size": 14, "out_hidden_size": 32}
        | (WINDOWS if kind == "2.5" else DEEPSTACK),
        text_config=shape
        | {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 3}
        | {"head_dim": 8}
        | {"vocab_size": len(tokenizer), "max_position_embeddings": 4096}
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        | {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [1, 1, 2],
            }
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
    )
    model = cls(config)
    for weight in model.parameters():
        if weight.ndim >= 2:
            torch.nn.init.normal_(weight, std=0.3)
    model.generation_config.suppress_tokens = [image, video]
    folder = tmp_path_factory.mktemp("qwen")
    model.save_pretrained(folder)
    pixels = Qwen2VLImageProcessorPil(size={"shortest_edge": 28**2, "longest_edge": 10**6})
    chat = images_only(image_processor=pixels, tokenizer=tokenizer, chat_template=CHAT)
    chat.save_pretrained(folder)
    model, _, processor, _ = load(folder, device_map="cpu")
    return model, processor


@pytest.fixture
def ask(made, photo):
    """(model, inputs): texts and the indices of their images."""

    def get(*asked):
        model, processor = made
        images = [photo(SIZES[i], i) for _, own in asked for i in own]
        texts = [text for text, _ in asked]
        batch = processor(text=texts, images=images or None, padding=True, return_tensors="pt")
        return attach(model), dict(batch)

    return get


def run(model, batch, **more):
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    return model.generate(**copy.deepcopy(batch), **options, **more)


@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_keep_all_is_stock_to_the_bit(ask, kind, prompts, way):
    model, batch = ask(*PROMPTS[prompts])
    ours, call = run(model, batch, **way), model(**batch).logits
    assert type(detach(model)) is KINDS[kind][1]
    assert not {"_pruner", "layout", "positions"} & set(vars(model))
    stock = run(model, batch, **way)
    assert torch.equal(ours.sequences, stock.sequences)
    assert len(ours.logits) == len(stock.logits) == 6
    assert all(map(torch.equal, ours.logits, stock.logits))
    assert torch.equal(call, model(**batch).logits)


@pytest.mark.parametrize("name", RUN)
def test_a_ragged_batch_answers_like_single_requests(ask, name):
    method, alone = METHODS[name], []
    if method.layers:  # the paper's, which move to those of this tower that see the whole image
        options = {} if name == "hivtp" else {"keep": 0.5}
        method = build_pruner(name, **options)
    prompts = PROMPTS["two images"] + PROMPTS["text only row"]
    for one in prompts:
        model, batch = ask(one)
        model.pruner = method
        rows = run(model, batch).sequences
        assert torch.equal(rows[:, :-6], batch["input_ids"])
        seen = model.kept if one[1] else ()
        alone.append((rows[0, -6:].tolist(), [image.kept.patch.tolist() for image in seen]))
    model, batch = ask(*prompts)
    model.pruner = method
    together = run(model, batch).sequences[:, -6:].tolist()
    assert together == [tokens for tokens, _ in alone]
    kept = [image.kept.patch.tolist() for image in model.kept]
    assert kept == [patches for _, images in alone for patches in images]
    assert name == "none" or all(image.patches < image.total for image in model.kept)


def test_survivors_and_text_keep_their_positions(ask):
    """Without cache, from stock's features, embeddings and positions put together by hand."""
    model, batch = ask(*PROMPTS["ragged"])
    model.pruner = HIVTP(**HIVTP_AT)
    answers, kept = run(model, batch).sequences[:, -6:], model.kept
    detach(model)
    grids, mask = batch["image_grid_thw"], batch["attention_mask"]
    features = model.model.get_image_features(batch["pixel_values"], grids)
    earlier = getattr(features, "deepstack_features", [])
    features = features.pooler_output
    positions, _ = model.model.get_rope_index(
        batch["input_ids"], batch["mm_token_type_ids"], grids, attention_mask=mask
    )
    embed = model.get_input_embeddings()
    for row, image in enumerate(kept):
        real = mask[row].bool()
        ids, places = batch["input_ids"][row][real], positions[:, row][:, real]
        marks = ids == model.config.image_token_id
        stay = ~marks
        stay[marks.nonzero()[image.kept.patch, 0]] = True
        torch.testing.assert_close(image.tokens, features[row][image.kept.patch])
        read = embed(ids).masked_scatter(marks[:, None], features[row])[stay][None]
        places, said, more = places[:, None, stay], [], {}
        for _ in range(6):
            if earlier:
                more["visual_pos_masks"] = torch.zeros(read.shape[:2], dtype=torch.bool)
                more["visual_pos_masks"][0, : int(stay.sum())] = marks[stay]
                more["deepstack_visual_embeds"] = [e[row][image.kept.patch] for e in earlier]
            hidden = model.model.language_model(inputs_embeds=read, position_ids=places, **more)
            logits = model.lm_head(hidden.last_hidden_state[0, -1])
            logits[model.generation_config.suppress_tokens] = -torch.inf
            said.append(int(logits.argmax()))
            read = torch.cat([read, embed(torch.tensor([[said[-1]]]))], 1)
            places = torch.cat([places, places[..., -1:] + 1], -1)
        assert said == answers[row].tolist()


def test_a_cache_from_a_direct_call_goes_on_where_the_prompt_ended(ask):
    model, batch = ask(*PROMPTS["single"])
    model.pruner = HIVTP(**HIVTP_AT)
    said = run(model, batch)
    token, want = said.sequences[:, -6:-5], said.logits[1]
    first = model(**batch, use_cache=True)
    assert first.logits.shape[1] < batch["input_ids"].shape[1]
    second = model(input_ids=token, past_key_values=first.past_key_values)
    torch.testing.assert_close(second.logits[:, -1], want)


def test_what_hivtp_reads_is_the_attention_of_the_whole_image(ask, kind, monkeypatch):
    stock_module = MODULES[kind]
    model, batch = ask(*PROMPTS["two images"])
    pictures = model.pictures(dict(batch))
    encoded = list(model.encode(pictures, (4, 8)))
    full = EVERYWHERE if kind == "2.5" else tuple(range(1, 9))
    maps, eager = [], stock_module.eager_attention_forward

    def spied(*args, **kwargs):
        output, weights = eager(*args, **kwargs)
        maps.append(weights)
        return output, weights

    monkeypatch.setattr(stock_module, "eager_attention_forward", spied)
    visual, grids = model.model.visual, batch["image_grid_thw"]
    visual.set_attn_implementation("eager")
    for (features, (picture,)), grid in zip(encoded, grids, strict=True):
        maps.clear()
        visual(picture.pixels, grid_thw=grid[None])
        whole = [m for m in maps if m.shape[-1] == len(picture.pixels)]
        assert len(whole) == len(full)
        fourth, eighth = (whole[full.index(layer)][0].mean((0, 1)) for layer in (4, 8))
        want = ((fourth + eighth) / 2).view(-1, 4).mean(1)
        if kind == "2.5":
            window, _ = stock_module.get_vision_window_index(grid[None], 2, 56, 14)
            want = want[window.argsort()]
        torch.testing.assert_close(received_attention(features, (4, 8))[0], want)
        assert features.sides == tuple(side // 2 for side in grid.tolist()[1:])
    visual.set_attn_implementation("sdpa")


def literal(scores, rows, columns, r, k, c):
    """HIVTP on a grid, loop by loop: (kept by the global stage, by the local stage)."""

    def best_first(cell):
        return sorted(cell, key=lambda place: (-scores[place], place))

    kept_global, kept_local = set(), set()
    for i in range(r):
        for j in range(r):
            cell = [
                y * columns + x
                for y in range(rows)
                for x in range(columns)
                if y * r // rows == i and x * r // columns == j
            ]
            count = int(Fraction(str(k)) * len(cell) / 100)
            kept_global |= set(best_first(cell)[:count])
    for top in range(0, rows, c or rows) if c else ():
        for left in range(0, columns, c):
            cell = [
                y * columns + x
                for y in range(top, min(top + c, rows))
                for x in range(left, min(left + c, columns))
            ]
            kept_local |= set(best_first([place for place in cell if place not in kept_global])[:1])
    return kept_global, kept_local


GRIDS = [(1, 1), (1, 9), (7, 2), (4, 6), (5, 7), (9, 3), (8, 12), (13, 11), (6, 6), (17, 24)]


@pytest.mark.parametrize("grid", [*GRIDS, (2, 31), (24, 24)], ids=str)
@pytest.mark.parametrize("setting", [(2, 25, 2), (3, 10, 4), (4, 33.3, None), (1, 50, 3)], ids=str)
def test_stages_on_a_grid_equal_the_literal_algorithm(grid, setting):
    (rows, columns), (r, k, c) = grid, setting
    pruner, area = HIVTP(r=r, k=k, c=c), rows * columns
    noise = torch.rand(area, generator=torch.Generator().manual_seed(area))
    ramp = torch.arange(area, dtype=torch.float32)
    scores = torch.stack([noise, (noise * 4).floor(), ramp, -ramp, torch.ones(area)])
    most = 0
    for row, stages in zip(scores.tolist(), pruner.stages(scores, grid), strict=True):
        kept_global, kept_local = literal(row, rows, columns, r, k, c)
        assert set((stages == 1).nonzero().flatten().tolist()) == kept_global
        assert set((stages == 2).nonzero().flatten().tolist()) == kept_local
        most = max(most, len(kept_global | kept_local))
    if most:
        assert most <= pruner.budget_on(grid)
    else:
        with pytest.raises(ValueError, match="keeps no token"):
            pruner.budget_on(grid)


@pytest.mark.parametrize("n", [6, 12, 24])
@pytest.mark.parametrize("setting", [(2, 25, 2), (3, 10, 6), (2, 15, None), (6, 40, 3)], ids=str)
def test_on_a_square_a_grid_changes_nothing(n, setting):
    r, k, c = setting
    pruner = HIVTP(r=r, k=k, c=c)
    noise = torch.rand(3, n * n, generator=torch.Generator().manual_seed(n))
    scores = torch.cat([noise, (noise * 5).floor()])
    assert torch.equal(pruner.stages(scores), pruner.stages(scores, (n, n)))
    assert pruner.budget(1, n * n) == pruner.budget_on((n, n))


def test_fill_keeps_the_budget_and_rows_are_whole(ask):
    model, batch = ask(*PROMPTS["two images"])
    model.pruner = HIVTP(**HIVTP_AT, fill=True)
    model(**batch)
    assert [image.patches for image in model.kept] == [
        model.pruner.budget_on(grid) for grid in _grids(model, batch)
    ]
    model.pruner = FoPru(layers=(8,), keep=0.5, strategy="row")
    model(**batch)
    for image, (rows, columns) in zip(model.kept, _grids(model, batch), strict=True):
        kept = torch.zeros(rows * columns).index_fill(0, image.kept.patch, 1).view(rows, columns)
        assert kept.sum(1).tolist().count(columns) == rows // 2
        assert image.patches == rows // 2 * columns


def _grids(model, batch):
    return [picture.frame for picture in model.pictures(dict(batch))]


def test_a_head_of_a_large_image_is_scored_in_parts(monkeypatch):
    draw = torch.randn(2, 1, 3, 50, 8, generator=torch.Generator().manual_seed(0))
    whole = column_means_in_pytorch(*draw)
    assert HEAD > 4 * 577**2
    monkeypatch.setattr("llava_hivtp.importance.HEAD", 4 * 50 * 7)
    torch.testing.assert_close(column_means_in_pytorch(*draw), whole)


def test_a_papers_layers_move_to_those_that_see_the_whole_image(ask, kind):
    assert for_depth(HIVTP(), 27, tuple(range(1, 28))).layers == (8, 9, 11, 12)
    assert for_depth(HIVTP(), 32, (8, 16, 24, 32)).layers == (8, 16)
    assert for_depth(build_pruner("fopru"), 32, (8, 16, 24, 32)).layers == (32,)
    model, _ = ask(*PROMPTS["single"])
    model.pruner = "hivtp"
    assert model.pruner.layers == ((2, 4) if kind == "2.5" else (3, 4))
    if kind == "3":
        model.pruner = HIVTP(layers=(3, 4))
        return
    with pytest.raises(ValueError, match=r"HIVTP: layers \[3\] attend within windows only"):
        model.pruner = HIVTP(layers=(3, 4))


@pytest.mark.parametrize("name", [n for n in METHODS if n not in RUN])
def test_methods_that_cannot_are_refused_by_name(ask, name):
    model, _ = ask(*PROMPTS["single"])
    why = "needs a square grid" if name in SQUARE else "reads the CLS token"
    with pytest.raises(ValueError, match=f"{type(METHODS[name]).__name__} {why}"):
        model.pruner = METHODS[name]
    assert model.pruner == METHODS["none"]


def test_half_of_the_merger_and_its_last_layer_are_the_merger(made):
    merger = made[0].model.visual.merger
    tokens = torch.randn(2, 5, 4 * 32)
    halfway = made[0].half_project(tokens)
    last = getattr(merger, "linear_fc2", None) or merger.mlp[-1]
    assert torch.equal(last(halfway), made[0].project(tokens))
    assert not torch.equal(halfway, made[0].project(tokens))


def test_answer_asks_in_the_chat_template(made, photo):
    model, processor = made
    attach(model, HIVTP(**HIVTP_AT))
    image = photo(SIZES[0], 0)
    reply = answer(model, processor.tokenizer, image, "What is it?", max_new_tokens=4)
    text = MARK + "<|vision_end|>What is it? A:"
    batch = processor(text=[text], images=[image], return_tensors="pt")
    rows = model.generate(**batch, max_new_tokens=4, do_sample=False)
    new = rows[0, batch["input_ids"].shape[1] :]
    assert reply.text == processor.tokenizer.decode(new, skip_special_tokens=True).strip()
    (kept,) = model.kept
    assert (reply.patches, reply.total) == (kept.patches, kept.total)
    assert kept.patches < kept.total == 96


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ({"image_grid_thw": None}, "image_grid_thw is missing"),
        ({"mm_token_type_ids": None}, "mm_token_type_ids is missing"),
        ({"pixel_values_videos": torch.zeros(1)}, "no video"),
        ({"image_grid_thw": torch.tensor([[2, 12, 8]])}, "for image_grid_thw"),
        ({"pixel_values": torch.zeros(8, 1176, dtype=torch.uint8)}, "must be a floating-point"),
    ],
)
def test_bad_calls_are_refused_by_name(ask, spoil, message):
    model, batch = ask(*PROMPTS["single"])
    with pytest.raises((ValueError, TypeError), match=message):
        model(**(batch | spoil))
