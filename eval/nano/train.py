"""Train the embedded model from nothing: the vision tower, then the language model."""

import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from eval.nano.checkpoint import export
from eval.nano.draw import LARGE
from eval.nano.fit import Schedule, fit, restore
from eval.nano.language import (
    Album,
    Newline,
    accuracy,
    build_language,
    language_loss,
    make_album,
    pack,
    questions_about,
    show_all,
    show_some,
)
from eval.nano.tower import Heads, build_projector, build_tower, draw_batch, tower_loss

VARIANTS = ("v15", "anyres", "nodrop")
TOWER_BATCH = 16
HALF = 0.72  # share of the steps in which the tower sees half of the patches: twice as fast
LANGUAGE_BATCH = 24
_EARLY = 0.5  # share of the steps that show only patches likely to hold something
_EARLY_ANYRES = 0.2  # shorter: such patches do not tell a thumbnail from a tile
_EASY = 0.15  # share of the steps with questions that one look answers


@dataclass(frozen=True)
class Sizes:
    """How long each stage trains and on how many pictures; tests make it small."""

    tower_steps: int = 6000
    language_steps: int = 2000
    nodrop_steps: int = 1800  # seeing all patches in every step, each takes twice as long
    album: int = 10_000
    anyres_steps: int = 1200
    anyres_album: int = 1500


def train_tower(folder: Path, steps: int) -> nn.ModuleDict:
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
    drop: bool,
    steps: int,
    album_size: int,
) -> nn.ModuleDict:
    """Stage 2 on the frozen tower; returns language model and projector.

    `drop` shows it a part of the patches in part of the steps; without, it always sees all.
    """
    torch.manual_seed(1)
    learning = nn.ModuleDict({"language": build_language(), "projector": build_projector()})
    learning["projector"].load_state_dict(parts["projector"].state_dict())
    with torch.no_grad():
        words = parts["heads"].words.weight
        learning["language"].get_input_embeddings().weight.copy_(words)
    if restore(folder, "language", learning, steps):
        return learning.eval()
    album = make_album(parts, "album", album_size)
    held_out = make_album(parts, "held out", min(200, album_size))

    def step(number: int) -> tuple[torch.Tensor, dict[str, float]]:
        rng = random.Random(f"language {number}")
        rows = [rng.randrange(len(album.pictures)) for _ in range(LANGUAGE_BATCH)]
        easy = number < _EASY * steps
        encoded, _ = questions_about(album, rows, rng, hints=True, easy=easy)
        early = number < _EARLY * steps
        shown = show_some(album, rows, rng, early) if drop else show_all(album, rows)
        return language_loss(learning, shown, pack(encoded)), {}

    schedule = Schedule(steps, 2e-3, warm=80, flat=0.3)
    fit(folder, "language", learning, schedule, step, check_on(learning, [held_out]), 200)
    return learning.eval()


def train_anyres(
    folder: Path,
    parts: nn.ModuleDict,
    small: nn.ModuleDict,
    steps: int,
    album_size: int,
) -> nn.ModuleDict:
    """Go on from the flat model with large images: a thumbnail, tiles and row breaks."""
    torch.manual_seed(2)
    learning = nn.ModuleDict(
        {"language": small["language"], "projector": small["projector"], "newline": Newline()}
    )
    if restore(folder, "anyres", learning, steps):
        return learning.eval()
    each = album_size // len(LARGE)
    albums = [make_album(parts, f"large {c}", each, c) for c in LARGE]
    held_out = [make_album(parts, f"held out {c}", min(40, each), c) for c in LARGE]
    # Only the largest canvas holds diagrams: show it as often as two others.
    chances = [2.0, *(1.0 for _ in LARGE[1:])]

    def step(number: int) -> tuple[torch.Tensor, dict[str, float]]:
        rng = random.Random(f"anyres {number}")
        (album,) = rng.choices(albums, chances)
        rows = [rng.randrange(len(album.pictures)) for _ in range(LANGUAGE_BATCH // 3)]
        encoded, _ = questions_about(album, rows, rng, hints=True)
        shown = show_some(album, rows, rng, number < _EARLY_ANYRES * steps)
        return language_loss(learning, shown, pack(encoded)), {}

    schedule = Schedule(steps, 1.5e-3, warm=80, flat=0.3)
    fit(folder, "anyres", learning, schedule, step, check_on(learning, held_out), 200)
    return learning.eval()


def check_on(learning: nn.ModuleDict, albums: list[Album]) -> Callable[[], dict[str, float]]:
    """Accuracy on pictures that training never shows, averaged over the albums that ask."""

    def check() -> dict[str, float]:
        learning.eval()
        scores: dict[str, list[float]] = defaultdict(list)
        for album in albums:
            for name, score in accuracy(learning, album).items():
                scores[name].append(score)
        learning.train()
        return {name: round(sum(each) / len(each), 4) for name, each in scores.items()}

    return check


def train(out: Path, variant: str, size: Sizes = Sizes()) -> Path:
    """Train a variant, or go on with it; writes its checkpoint into `out`.

    `v15` is flat, `nodrop` its twin that never saw fewer than all patches, `anyres` goes on from
    `v15`. All share the tower.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    parts = train_tower(out / "tower", size.tower_steps)
    drop = variant != "nodrop"
    flat, steps = ("v15", size.language_steps) if drop else (variant, size.nodrop_steps)
    learned = train_language(out / flat, parts, drop, steps, size.album)
    if variant == "anyres":
        learned = train_anyres(out / variant, parts, learned, size.anyres_steps, size.anyres_album)
    return export(out / variant / "checkpoint", parts, learned, variant == "anyres")


def logs(out: Path, variant: str) -> dict[str, Path]:
    """The logs of the stages that make up a variant."""
    flat = "nodrop" if variant == "nodrop" else "v15"
    files = {"tower": out / "tower" / "tower.jsonl", flat: out / flat / "language.jsonl"}
    return files | ({"anyres": out / "anyres" / "anyres.jsonl"} if variant == "anyres" else {})
