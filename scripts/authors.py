"""Patches that SCOPE, HoloV and CDPruner keep, here and by their authors' code.

    git clone https://github.com/kinredon/SCOPE; ... obananas/HoloV; ... Theia-4869/CDPruner
    python scripts/authors.py SCOPE HoloV CDPruner > eval/measured/authors.md

Ten images as a small random tower of 576 patches sees them, four counts. The released functions are
taken out of their files by name and run as they are, in float32 on the same tokens and attention.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eval.machine import commit, device_name
from eval.markdown import pipes
from eval.untrained.models import random_tower
from eval.untrained.shapes import Encoder
from llava_hivtp import build_pruner
from llava_hivtp.importance import cls_attention
from llava_hivtp.vision import VisionFeatures, encode_tiles

IMAGES, WORDS, WIDTH = 10, 12, 1024
COUNTS = (432, 288, 144, 64)
LAYER = 3
Choose = Callable[[VisionFeatures, int], Tensor]  # indices of the patches of a tile, any order


def taken(file: Path, names: set[str], known: Mapping[str, Any]) -> dict[str, Any]:
    """Functions and classes of a file by name, without running the rest of it."""
    tree = ast.parse(file.read_text())
    wanted = [
        node
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in names
    ]
    space = dict(known)
    exec(compile(ast.Module(wanted, []), str(file), "exec"), space)
    return {name: space[name] for name in names}


def release(folder: Path) -> str:
    """Name and commit of a clone."""
    head = ["git", "-C", str(folder), "log", "-1", "--format=%h"]
    return f"{folder.resolve().name} {subprocess.check_output(head, text=True).strip()}"


def scope(folder: Path) -> Choose:
    """Its facility location under the naive greedy optimizer, alpha 1."""
    methods = folder / "LLaVA" / "llava" / "model" / "methods_utils"
    known = {"np": np, "os": os, "torch": torch, "SimpleNamespace": SimpleNamespace}
    names = {"SubmodularFunction", "FacilityLocation"}
    found = taken(methods / "submodular_function.py", names, known)
    found |= taken(methods / "submodular_optimizer.py", {"optimizer", "NaiveGreedy"}, known)
    os.environ["ALPHA"] = "1"

    def choose(features: VisionFeatures, count: int) -> Tensor:
        tokens = features.tokens[0]
        directions = tokens / tokens.norm(dim=1, keepdim=True)
        index = np.arange(len(tokens))
        gain = found["FacilityLocation"](
            index=index,
            cls_attn=cls_attention(features, LAYER)[0].numpy(),
            similarity_matrix=(directions @ directions.T).numpy(),
        )
        greedy = found["NaiveGreedy"](index=index, budget=count, already_selected=[])
        return torch.tensor(greedy.select(gain.calc_gain, gain.update_state))

    return choose


def holov(folder: Path) -> Choose:
    """Its function, which returns tokens: they are found again by their first two numbers."""
    found = taken(folder / "llava" / "model" / "utils.py", {"HoloV"}, {"torch": torch})

    def choose(features: VisionFeatures, count: int) -> Tensor:
        projected = features.projected()
        kept = found["HoloV"](projected, cls_attention(features, LAYER), 16, count)[0]
        same = (kept[:, None, :2] == projected[0, None, :, :2]).all(2)
        return same[same.any(1)].int().argmax(1)  # where it fills up with zeros, none is found

    return choose


def cdpruner(folder: Path) -> Choose:
    """Its `encode_images`, given the question as embedded here; it negates its cosines."""
    file = folder / "llava" / "model" / "llava_arch.py"
    encode = taken(file, {"encode_images"}, {"torch": torch})["encode_images"]

    def choose(features: VisionFeatures, count: int) -> Tensor:
        def tower(images: None, texts: None) -> tuple[Tensor, Tensor, Tensor]:
            return features.tokens, features.projected(), -features.question

        model = SimpleNamespace(get_vision_tower=lambda: tower, mm_projector=features.project)
        model.get_model, model.visual_token_num = (lambda: model), count
        return encode(model, None)[1][0].nonzero()[:, 0]

    return choose


AUTHORS = {"scope": scope, "holov": holov, "cdpruner": cdpruner}


def images() -> list[VisionFeatures]:
    """What the tower gives for each image, a projector, and a question."""
    torch.manual_seed(0)
    tower = random_tower(Encoder(width=128, mlp=256, layers=4, heads=4))
    # As wide as to leave no patch in the span of others: there the release divides by nothing.
    projector = nn.Sequential(nn.Linear(128, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
    found = []
    for _ in range(IMAGES):
        coarse = torch.rand(1, 3, 12, 12)
        pixels = torch.nn.functional.interpolate(coarse, size=(336, 336), mode="bicubic")
        hidden, tap = encode_tiles(tower, pixels + 0.1 * torch.randn(1, 3, 336, 336), 3, (LAYER,))
        question = torch.randn(WORDS, WIDTH)
        found.append(
            VisionFeatures(
                hidden[:, 1:], hidden[:, 0], tap.queries, tap.keys, projector, question=question
            )
        )
    return found


@torch.no_grad()
def main(folders: list[Path]) -> None:
    """Print how many sets are equal, and where they are not how many patches are shared."""
    pictures, lines = images(), [("method", *(f"{count} of 576" for count in COUNTS))]
    said = []
    for (name, load), folder in zip(AUTHORS.items(), folders, strict=True):
        theirs, cells = load(folder), []
        layers = {} if name == "cdpruner" else {"layers": (LAYER,)}
        for count in COUNTS:
            pruner = build_pruner(name, keep=count / 576 + 1e-6, **layers)
            shared = []
            for features in pictures:
                own = set(pruner.select(features).patch.tolist())
                shared.append(len(own & set(theirs(features, count).tolist())) / len(own))
            equal = sum(share == 1 for share in shared)
            least = f" ({min(shared):.1%} shared at least)" if equal < len(shared) else ""
            cells.append(f"{equal} of {len(shared)}{least}")
        lines.append((name, *cells))
        said.append(release(folder))
    print(f"python scripts/authors.py, at commit {commit()}, on {device_name()}; releases:")
    print(f"{', '.join(said)}. Equal sets of patches, of {IMAGES} images each:\n")
    print(pipes(lines, 1))


if __name__ == "__main__":
    main([Path(folder) for folder in sys.argv[1:]])
