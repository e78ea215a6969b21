"""Train the embedded model from nothing: the vision tower, then the language model."""

import random
from pathlib import Path

import torch
from torch import nn

from eval.nano.fit import Schedule, fit
from eval.nano.language import (
    accuracy,
    build_language,
    choose_patches,
    language_loss,
    make_album,
    pack,
    questions_about,
)
from eval.nano.tower import Heads, build_projector, build_tower, draw_batch, tower_loss

TOWER_STEPS = 5000
TOWER_BATCH = 16
HALF = 0.72  # share of the steps in which the tower sees half of the patches: twice as fast

LANGUAGE_STEPS = 2400
LANGUAGE_BATCH = 24
ALBUM = 12_000  # pictures
_EASY = 0.15  # share of the steps with questions that one look answers


def train_tower(folder: Path, steps: int = TOWER_STEPS) -> nn.ModuleDict:
    """Stage 1; returns tower, projector and heads."""
    torch.manual_seed(0)
    parts = nn.ModuleDict(
        {"tower": build_tower(), "projector": build_projector(), "heads": Heads()}
    )

    def step(number: int) -> tuple[torch.Tensor, dict[str, float]]:
        batch = draw_batch(f"tower {number}", TOWER_BATCH, number < HALF * steps)
        return tower_loss(parts["tower"], parts["projector"], parts["heads"], batch)

    fit(folder, "tower", parts, Schedule(steps, 1.5e-3), step)
    return parts.requires_grad_(False).eval()


def train_language(
    folder: Path,
    parts: nn.ModuleDict,
    drop: bool = True,
    steps: int = LANGUAGE_STEPS,
    album_size: int = ALBUM,
) -> nn.ModuleDict:
    """Stage 2 on the frozen tower; returns language model and projector.

    `drop` shows it a part of the patches in part of the steps; without, it always sees all.
    """
    torch.manual_seed(1)
    language, projector = build_language(), build_projector()
    projector.load_state_dict(parts["projector"].state_dict())
    with torch.no_grad():
        language.get_input_embeddings().weight.copy_(parts["heads"].words.weight)
    learning = nn.ModuleDict({"language": language, "projector": projector})
    frozen = parts["tower"], parts["projector"], parts["heads"]
    album = make_album(*frozen, "album", album_size)
    held_out = make_album(*frozen, "held out", min(200, album_size))

    def step(number: int) -> tuple[torch.Tensor, dict[str, float]]:
        rng = random.Random(f"language {number}")
        rows = [rng.randrange(len(album.pictures)) for _ in range(LANGUAGE_BATCH)]
        easy = number < _EASY * steps
        encoded, _ = questions_about(album, rows, rng, hints=True, easy=easy)
        patches = choose_patches(album, rows, rng, number / steps, drop)
        return language_loss(language, projector, patches, pack(encoded)), {}

    def check() -> dict[str, float]:
        language.eval()
        scores = accuracy(language, projector, held_out)
        language.train()
        return scores

    fit(folder, "language", learning, Schedule(steps, 2e-3, warm=80, flat=0.3), step, check, 200)
    return learning.eval()
