"""Image tokens that FastV, PDrop, SparseVLM and DART keep, here and by the released code.

    git clone https://github.com/pkunlp-icler/FastV; ... Cooperx521/PyramidDrop;
    ... Gumpest/SparseVLMs; ... ModelTC/LightCompress
    python scripts/authors_inside.py FastV PyramidDrop SparseVLMs LightCompress \
        >> eval/measured/authors.md

The images of `authors.py` between random words, in a small random Llama, in float32. The released
forward passes run as they are over this Llama's layers, with whole attention maps. DART's code is
that of LightCompress.
"""

from __future__ import annotations

import logging
import math
import sys
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from authors import COUNTS, IMAGES, WIDTH, images, release, taken
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from eval.machine import commit, device_name
from eval.markdown import pipes
from llava_hivtp import build_pruner
from llava_hivtp.dropping import dropping

BEFORE, PATCHES, BEHIND = 10, 576, 20  # words, tokens of the image, words
PIVOTS = 4  # of the image, and as many of the text
Sets = list[set[int]]  # positions of the prompt whose tokens are left, behind every layer in turn
Choose = Callable[[LlamaModel, Tensor, tuple[int, ...], list[int]], Sets]
KNOWN = {
    "torch": torch, "nn": nn, "math": math, "BaseModelOutputWithPast": BaseModelOutputWithPast,
    "DynamicCache": DynamicCache, "StaticCache": (), "Cache": (),
    "IGNORE_INDEX": -100, "_prepare_4d_causal_attention_mask_for_sdpa": lambda *_: None,
} | {name: getattr(typing, name) for name in ("List", "Optional", "Tuple", "Union")}  # fmt: skip


def causal(length: int) -> Tensor:
    """(1, 1, S, S) what attention adds, 0 where a row sees a column."""
    return torch.full((1, 1, length, length), torch.finfo(torch.float32).min).triu(1)


@dataclass
class Layer:
    """A layer of transformers 5 as these releases call theirs; it notes the positions it reads."""

    model: LlamaModel
    block: nn.Module
    read: Tensor | None = None

    def __call__(self, hidden_states: Tensor, *, position_ids: Tensor, **_: Any) -> tuple:
        """(hidden states, attention, attention): one of them reads the second, one the third."""
        self.read, maps = position_ids[0], []
        note = self.block.self_attn.register_forward_hook(lambda _, given, out: maps.append(out[1]))
        turned = self.model.rotary_emb(hidden_states, position_ids)
        mask = causal(hidden_states.shape[1])
        hidden = self.block(hidden_states, attention_mask=mask, position_embeddings=turned)
        note.remove()
        return hidden, maps[0], maps[0]


def decoder(model: LlamaModel, **own: Any) -> SimpleNamespace:
    """What a released forward pass reads of its model."""
    config = SimpleNamespace(output_attentions=False, output_hidden_states=False, use_cache=False)
    return SimpleNamespace(
        layers=[Layer(model, block) for block in model.layers], norm=model.norm, config=config,
        gradient_checkpointing=False, training=False, device=torch.device("cpu"),
        _use_flash_attention_2=False, _use_sdpa=True, **own,
    )  # fmt: skip


def fastv(folder: Path) -> Choose:
    """Its `fastv_forward` for transformers' LLaVA."""
    llama = "llava-hf/transformers/src/transformers/models/llama/modeling_llama.py"
    nothing = {"add_start_docstrings": lambda *_: lambda cls: cls, "LLAMA_START_DOCSTRING": ""}
    nothing |= {"add_start_docstrings_to_model_forward": lambda _: lambda function: function}
    nothing |= {"LLAMA_INPUTS_DOCSTRING": "", "LlamaPreTrainedModel": object, "LlamaConfig": None}
    found = taken(folder / "src" / "FastV" / llama, {"LlamaModel"}, KNOWN | nothing)["LlamaModel"]

    def choose(model: LlamaModel, prompt: Tensor, after: tuple, counts: list[int]) -> Sets:
        own = decoder(model, _update_causal_mask=lambda *_: None)
        settings = {"fastv_k": after[0], "fastv_r": 1 - counts[0] / PATCHES}
        settings |= {"image_token_start_index": BEFORE, "image_token_length": PATCHES}
        found.fastv_forward(own, inputs_embeds=prompt, return_dict=True, fastv_config=settings)
        return [set(own.layers[after[0]].read.tolist())]

    return choose


def pdrop(folder: Path) -> Choose:
    """Its `pdrop_forward` as SDPA runs it."""
    names = {"pdrop_forward", "pdrop_rank_drop", "apply_rotary_pos_emb", "rotate_half"}
    known = KNOWN | {
        "_prepare_4d_causal_attention_mask": lambda _, shape, *__, **___: causal(shape[1])
    }
    file = folder / "llava" / "model" / "modeling_llama_pdrop.py"
    found = taken(file, names | {"LlamaRotaryEmbedding"}, known)

    def choose(model: LlamaModel, prompt: Tensor, after: tuple, counts: list[int]) -> Sets:
        width = model.config.head_dim
        heads = {"num_heads": WIDTH // width, "num_key_value_heads": WIDTH // width}
        rope = found["LlamaRotaryEmbedding"](width)
        own = decoder(model, layer_list=list(after), image_tokens=[PATCHES])
        own.image_token_posi, own.prompt_len = [BEFORE], [BEFORE + BEHIND]
        # Its int() of a product in binary fractions may lose one; a hair more does not.
        own.image_token_ratio_list = [1] + [(count + 1e-6) / PATCHES for count in counts]
        for layer, block in zip(own.layers, model.layers, strict=True):
            parts = {name: getattr(block.self_attn, name) for name in ("q_proj", "k_proj")}
            layer.self_attn = SimpleNamespace(
                **parts, v_proj=block.self_attn.v_proj, head_dim=width, rotary_emb=rope, **heads
            )
            layer.input_layernorm = block.input_layernorm
        left, sets = torch.arange(prompt.shape[1]), []

        def drop(**given: Any) -> tuple:
            nonlocal left
            out = found["pdrop_rank_drop"](own, **given)
            left = left[rows_of(given["features"][0], out[2][0])]
            sets.append(set(left.tolist()))
            return out

        own.pdrop_rank_drop = drop
        found["pdrop_forward"](own, inputs_embeds=prompt, return_dict=True)
        return sets

    return choose


def rows_of(before: Tensor, after: Tensor) -> Tensor:
    """Which rows of (S, D) are in (S', D), found again by their first two numbers."""
    return (before[:, None, :2] == after[None, :, :2]).all(2).any(1)


def sparsevlm(folder: Path) -> Choose:
    """Its first release, without the clusters that it adds behind every stage."""
    code = folder / "llava" / "model" / "language_model"
    known = KNOWN | {"V2_0": False, "loggerinfo": logging.getLogger(), "prefix": ""}
    known |= {"LlamaModel": object, "LlamaConfig": None}
    known |= taken(code / "utils.py", {"batch_index_select"}, KNOWN)
    scores = {"RETAIN_TOKN": 0} | KNOWN

    def choose(model: LlamaModel, prompt: Tensor, after: tuple, counts: list[int]) -> Sets:
        tables = {"sparse_token_dict": {0: counts}}
        tables["layer_dict"] = {layer - 1: stage for stage, layer in enumerate(after)}
        name = "attn_postprocess_topk"
        rate = taken(code / "score.py", {name}, scores | tables)[name]
        left, sets = torch.arange(prompt.shape[1]), []

        def rated(*given: Any) -> tuple:
            nonlocal left
            kept, _, score = rate(*given)
            stay = torch.ones(len(left), dtype=torch.bool)
            stay[BEFORE : BEFORE + kept.shape[1]] = kept[0]
            left = left[stay]
            sets.append(set(left.tolist()))
            return kept, False, score  # False: nothing is clustered, as in its second release

        cls = "LlamaDynamicvitModel"
        found = taken(code / "modelling_sparse_llama.py", {cls}, known | {name: rated})[cls]
        own = decoder(model, pruning_loc=[layer - 1 for layer in after])
        own.init_token_total_shape, own.generate_process_count = prompt.shape[1], 0
        own.all_FLOPs = own.total_cuda_time = own.num_forward = own.num_token_pool = 0
        own.num_layers = len(own.layers)
        for layer, block in zip(own.layers, model.layers, strict=True):
            layer.mlp = block.mlp
        clock = SimpleNamespace(record=lambda: None, elapsed_time=lambda _: 0.0)
        with mock.patch.multiple("torch.cuda", Event=lambda **_: clock, synchronize=lambda: None):
            found.forward(
                own, inputs_embeds=prompt, return_dict=True, pre_prompt_length_list=[BEFORE]
            )
        return sets

    return choose


def dart(folder: Path, **known: Any) -> Choose:
    """LightCompress's choice; `known` may give another `set`."""
    name = "get_retained_image_token"
    file = folder / "llmc" / "compression" / "token_reduction" / "dart.py"
    retained = taken(file, {name}, KNOWN | known)[name]

    def choose(model: LlamaModel, prompt: Tensor, after: tuple, counts: list[int]) -> Sets:
        out = model(inputs_embeds=prompt, use_cache=True, output_hidden_states=True)
        settings = {"vision_token_start_index": BEFORE, "vision_token_length": PATCHES}
        settings |= {"pivot_image_token": PIVOTS, "pivot_text_token": PIVOTS}
        settings["reduction_ratio"] = 1 - (counts[0] - PIVOTS + 1e-6) / PATCHES
        hidden = model.norm(out.hidden_states[after[0]])
        image = retained(settings, hidden, out.past_key_values.layers[after[0] - 1].keys)
        return [set(image.tolist()) | words()]

    return choose


class Ordered(dict):
    """What DART's code asks of a set, in the order in which its items came."""

    def __init__(self, items: Iterable[int]) -> None:
        super().__init__(dict.fromkeys(items))

    def update(self, items: Iterable[int]) -> None:
        """Add items at the end."""
        super().update(dict.fromkeys(items))

    def difference_update(self, items: Iterable[int]) -> None:
        """Take items out."""
        for item in items:
            self.pop(item, None)

    def __sub__(self, other: Ordered) -> Ordered:
        return Ordered(item for item in self if item not in other)


def words() -> set[int]:
    """Positions of the prompt that are no image's."""
    return set(range(BEFORE + PATCHES + BEHIND)) - set(range(BEFORE, BEFORE + PATCHES))


def here(name: str, arguments: dict[str, Any]) -> Choose:
    """This project's."""

    def choose(model: LlamaModel, prompt: Tensor, after: tuple, counts: list[int]) -> Sets:
        keep = tuple(count / PATCHES + 1e-6 for count in counts)
        image = torch.zeros(1, prompt.shape[1], dtype=torch.bool)
        image[:, BEFORE : BEFORE + PATCHES] = True
        masks = (image, torch.ones_like(image))
        pruner = build_pruner(name, after=after, keep=keep, **arguments)
        with dropping(model, pruner, lambda rows: masks) as run:
            model(inputs_embeds=prompt)
        return [set(run.stages[layer].index[0].tolist()) for layer in after]

    return choose


@torch.no_grad()
def main(folders: list[Path]) -> None:
    """Print how many choices are equal, and where they are not how many tokens are shared."""
    fast, pyramid, sparse, light = folders
    stages = (1, 2, 3)
    pivots = {"image_pivots": PIVOTS, "text_pivots": PIVOTS}
    cases = [
        ("fastv", fastv(fast), (2,), {}),
        ("pdrop", pdrop(pyramid), stages, {}),
        ("sparsevlm", sparsevlm(sparse), stages, {}),
        ("dart", dart(light), (2,), pivots),
        ("dart, pivots in turn", dart(light, set=Ordered), (2,), pivots),
    ]
    torch.manual_seed(1)
    # Weights so large that attention is as uneven as a trained model's.
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, vocab_size=32, initializer_range=0.04,
        attn_implementation="eager",
    )  # fmt: skip
    model = LlamaModel(config).eval()
    prompts = [
        torch.cat([torch.randn(1, BEFORE, WIDTH), image, torch.randn(1, BEHIND, WIDTH)], 1)
        for image in (picture.projected() for picture in images())
    ]
    lines = [("method", *(f"{count} of 576" for count in COUNTS))]
    for name, theirs, after, arguments in cases:
        ours, cells = here(name.split(",")[0], arguments), []
        for count in COUNTS:
            if arguments:
                count = PIVOTS + (count - PIVOTS) // (2 * PIVOTS) * 2 * PIVOTS
            counts = [count // 2**stage for stage in range(len(after))]
            shared = []
            for prompt in prompts:
                pairs = zip(
                    ours(model, prompt, after, counts),
                    theirs(model, prompt, after, counts),
                    strict=True,
                )
                for wanted, (own, other) in zip(counts, pairs, strict=True):
                    assert len(own) == len(other) == wanted + len(words())
                    shared.append(1 - len(own - other) / wanted)
            equal = sum(share == 1 for share in shared)
            least = f" ({min(shared):.1%} shared at least)" if equal < len(shared) else ""
            cells.append(f"{equal} of {len(shared)}{least}")
        lines.append((name, *cells))
    print(
        f"\npython scripts/authors_inside.py, at commit {commit()}, on {device_name()}; releases:"
    )
    print(", ".join(map(release, folders)) + ".")
    print(
        f"Equal sets of image tokens in a random Llama, of {IMAGES} images each: fastv and dart\n"
        "behind layer 2, pdrop and sparsevlm behind layers 1, 2 and 3, where as many are left as\n"
        "said, a half and a quarter of it; every set counts. Of sparsevlm's release the first\n"
        "version, without the clusters that it adds to what is left. DART's code keeps 4 and a\n"
        "multiple of 8: 428, 284, 140 and 60. It takes its pivots as Python's `set` has them,\n"
        "here they come in turn: the last row is its code with a set that keeps the order.\n"
    )
    print(pipes(lines, 1))


if __name__ == "__main__":
    main([Path(folder) for folder in sys.argv[1:]])
