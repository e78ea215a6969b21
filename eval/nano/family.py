"""A family of small models with towers of their own: what holds on one need not hold on another."""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from eval.nano import EMBEDDED
from eval.nano.checkpoint import export
from eval.nano.contrastive import BATCH, Matcher, contrastive_loss, draw_pairs
from eval.nano.fit import Schedule, fit, restore
from eval.nano.language import (
    build_language,
    language_loss,
    make_album,
    pack,
    questions_about,
    show_all,
)
from eval.nano.tower import Heads, build_projector, build_tower, draw_batch, tower_loss
from eval.nano.train import LANGUAGE_BATCH, TOWER_BATCH, check_on

LAYERS = 8
HALVES = 0.85  # share of the steps in which the tower sees half of the patches
_CAPTIONED_HALVES = 0.92  # the same where captions teach
_EASY = 0.2  # share of the steps with captions of mixed kinds of pictures that say everything


@dataclass(frozen=True)
class Member:
    """One model of the family."""

    seed: int
    guide: float = 0.0  # weight of the attention to things in the tower's loss
    captions: bool = False  # the tower learns from captions, not from labels of patches


FAMILY = {
    "unguided": Member(1),
    "guided": Member(2, guide=0.5),
    "contrastive": Member(3, captions=True),
}


@dataclass(frozen=True)
class Lengths:
    """How long each stage trains and on how many pictures; tests make it small."""

    tower_steps: int = 2400
    language_steps: int = 300
    album: int = 2500
    caption_steps: int = 1800
    projector_steps: int = 150  # with the language model frozen, after captions


def train_member(out: Path, name: str, size: Lengths = Lengths()) -> Path:
    """Train a model of the family, or go on with it; writes its checkpoint into `out`."""
    if name not in FAMILY:
        raise ValueError(f"name must be one of {', '.join(FAMILY)}, got {name!r}")
    member = FAMILY[name]
    if member.captions:
        parts = _train_on_captions(out / name, member, size.caption_steps)
    else:
        parts = _train_tower(out / name, member, size.tower_steps)
    learned = _train_language(out / name, parts, member.seed, size)
    return export(out / name / "checkpoint", parts, learned)


def _train_tower(folder: Path, member: Member, steps: int) -> nn.ModuleDict:
    """Tower, projector and heads from nothing; the words they are to say are the shipped ones."""
    torch.manual_seed(member.seed)
    parts = nn.ModuleDict(
        {"tower": build_tower(LAYERS), "projector": build_projector(), "heads": Heads()}
    )
    words = parts["heads"].words.weight
    with torch.no_grad():
        words.copy_(_shipped()["model.embed_tokens.weight"])
    words.requires_grad_(False)

    def step(number: int) -> tuple[torch.Tensor, dict[str, float]]:
        seed = f"tower {member.seed} {number}"
        batch = draw_batch(seed, TOWER_BATCH, number < HALVES * steps)
        named = (parts["tower"], parts["projector"], parts["heads"])
        return tower_loss(*named, batch, member.guide)

    fit(folder, "tower", parts, Schedule(steps, 1.5e-3), step)
    return parts.requires_grad_(False).eval()


def _train_on_captions(folder: Path, member: Member, steps: int) -> nn.ModuleDict:
    """Tower from nothing, beside a reader of captions that is needed only here."""
    torch.manual_seed(member.seed)
    parts = nn.ModuleDict({"tower": build_tower(LAYERS), "matcher": Matcher()})

    def step(number: int) -> tuple[torch.Tensor, dict[str, float]]:
        seed = f"captions {member.seed} {number}"
        pairs = draw_pairs(seed, BATCH, number < _CAPTIONED_HALVES * steps, number < _EASY * steps)
        return contrastive_loss(parts["tower"], parts["matcher"], pairs)

    fit(folder, "tower", parts, Schedule(steps, 1.5e-3), step)
    return parts.requires_grad_(False).eval()


def _train_language(folder: Path, parts: nn.ModuleDict, seed: int, size: Lengths) -> nn.ModuleDict:
    """The shipped language model, which never saw pruned inputs, goes on with another tower."""
    torch.manual_seed(seed)
    learning = nn.ModuleDict({"language": build_language(), "projector": build_projector()})
    if "projector" in parts:
        learning["projector"].load_state_dict(parts["projector"].state_dict())
    shipped = {k: v for k, v in _shipped().items() if ".mm_projector." not in k}
    shipped["lm_head.weight"] = shipped["model.embed_tokens.weight"]
    learning["language"].load_state_dict(shipped)
    if restore(folder, "language", learning, size.language_steps):
        return learning.eval()
    album = make_album(parts, f"album {seed}", size.album)
    held_out = make_album(parts, "held out", min(200, size.album))

    def step(number: int) -> tuple[torch.Tensor, dict[str, float]]:
        rng = random.Random(f"language {seed} {number}")
        rows = [rng.randrange(len(album.pictures)) for _ in range(LANGUAGE_BATCH)]
        encoded, _ = questions_about(album, rows, rng, hints=True)
        return language_loss(learning, show_all(album, rows), pack(encoded)), {}

    if "projector" not in parts:  # nothing told its patches which words to lie near
        learning["language"].requires_grad_(False)
        fit(folder, "projector", learning["projector"], Schedule(size.projector_steps, 3e-3), step)
        learning["language"].requires_grad_(True)
    schedule = Schedule(size.language_steps, 1e-3, warm=30, flat=0.3)
    fit(folder, "language", learning, schedule, step, check_on(learning, [held_out]), 100)
    return learning.eval()


def _shipped() -> dict[str, torch.Tensor]:
    """Language model and projector of the embedded model, float32."""
    weights = load_file(EMBEDDED / "model.safetensors")
    return {name: value.float() for name, value in weights.items()}
