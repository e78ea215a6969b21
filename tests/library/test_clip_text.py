"""CDPruner by CLIP's text tower: the relevance of the released code, question by question."""

from __future__ import annotations

import json

import pytest
import torch
from ask import generate
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPModel, CLIPTokenizerFast

from llava_hivtp import attach, build_pruner, load
from llava_hivtp.clip_text import clip_text

WHAT, WHICH = "USER: <image>\nWhat? ASSISTANT:", "USER: <image>\nWhich colour has it? ASSISTANT:"
LONG = f"USER: <image>\n{'Which colour has it? ' * 4}ASSISTANT:"


@pytest.fixture(scope="module")
def llava(tiny):
    return load(tiny(), device_map="cpu")[:3]


@pytest.fixture(scope="module")
def clip(llava, tmp_path_factory):
    """Folder of a whole CLIP with a tower of the tiny LLaVA's shape, and random weights."""
    folder = tmp_path_factory.mktemp("clip")
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer.save_pretrained(folder)
    text = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 40, "vocab_size": len(words), "eos_token_id": len(words) - 1,
    }  # fmt: skip
    vision = llava[0].get_vision_tower().config.to_dict()
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    CLIPModel(config).save_pretrained(folder)
    return str(folder)


def literal_relevance(folder, tokens, question):
    """As the released code finds it, for one image."""
    model, tokenizer = CLIPModel.from_pretrained(folder), CLIPTokenizerFast.from_pretrained(folder)
    ids = tokenizer(question)["input_ids"]
    parts = [ids[start : start + 40] for start in range(0, len(ids), 40)]
    rows = torch.tensor([part + [0] * (40 - len(part)) for part in parts])
    mask = torch.tensor([[1] * len(part) + [0] * (40 - len(part)) for part in parts])
    with torch.no_grad():
        pooled = model.text_model(input_ids=rows, attention_mask=mask).pooler_output
        words = model.text_projection(pooled)
        seen = model.visual_projection(model.vision_model.post_layernorm(tokens))
    cosines = torch.stack([
        torch.stack([torch.cosine_similarity(patch, word, 0) for word in words]) for patch in seen
    ])  # fmt: skip
    return -cosines.mean(1)


@pytest.mark.parametrize("prompt", [WHAT, LONG])
def test_the_relevance_is_the_released_one_of_the_image_s_own_question(
    llava, clip, photo, monkeypatch, prompt
):
    pruner, seen = build_pruner("cdpruner", keep=0.5, clip=clip), []
    relevance = type(pruner).relevance

    def hear(self, directions, features):
        found = relevance(self, directions, features)
        seen.append((features, found))
        return found

    monkeypatch.setattr(type(pruner), "relevance", hear)
    attach(llava[0], pruner)
    generate(*llava, [photo((112, 90), 0), photo((61, 120), 1)], prompt, WHICH)
    for (features, found), text in zip(seen, (prompt, WHICH), strict=True):
        question = text.partition("<image>")[2]
        assert features.text.strip() == question.strip()
        expected = literal_relevance(clip, features.tokens[0], features.text)
        assert torch.allclose(found[0], expected, atol=1e-5)
    attach(llava[0])


def test_a_batch_chooses_like_single_images(llava, clip, photo):
    attach(llava[0], build_pruner("cdpruner", keep=0.5, clip=clip))
    images = [photo((112, 90), 0), photo((61, 120), 1)]
    generate(*llava, images, WHAT, WHICH)
    together = [image.kept.patch for image in llava[0].kept]
    for image, text, patch in zip(images, (WHAT, WHICH), together, strict=True):
        generate(*llava, [image], text)
        assert torch.equal(llava[0].kept[0].kept.patch, patch)
    attach(llava[0])


def test_what_is_missing_is_named(llava, clip, photo, tmp_path, monkeypatch):
    model = llava[0]
    with pytest.raises(ValueError, match="clip='.*' is no folder or hub id of a whole CLIP"):
        model.pruner = build_pruner("cdpruner", keep=0.5, clip=str(tmp_path))
    model.pruner = build_pruner("cdpruner", keep=0.5, clip=clip)
    with pytest.raises(ValueError, match="gives 8 numbers a patch, this CLIP takes"):
        clip_text(clip).patches(torch.zeros(1, 4, 8))
    monkeypatch.setattr(model, "decode", None)
    with pytest.raises(ValueError, match=r"set model.decode = tokenizer.decode"):
        generate(*llava, [photo((112, 90))], WHAT)
    monkeypatch.undo()
    attach(model)
