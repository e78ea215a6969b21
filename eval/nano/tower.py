"""Stage 1: a CLIP vision tower whose projected patches already point at the words for them."""

import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from eval.nano.draw import PATCH, SIDE, draw
from eval.nano.fit import low_precision
from eval.nano.labels import ASPECTS, EVERYWHERE, GRID, IGNORE, SUMMARY, label
from eval.nano.text import build_tokenizer
from llava_hivtp.pruners.base import PaperLayers

WIDTH = 128
LAYERS = 12
HEADS = 4
MIDDLE = PaperLayers((7, 8, 9, 10))  # of 24: whose attention learns to follow the things drawn
MEAN, STD = 0.4, 0.25  # of a pixel, the same for the three channels
_WEIGHTS = {"character": 2.0, "place": 0.5, "side": 0.3, "height": 0.3, "number": 0.5}
_GUIDE = 0.5  # weight of the attention to things
_KINDS = {"dense": 0.4, "scene": 0.25, "diagram": 0.25, "sign": 0.1}
_SHOWN = 72  # patches shown in the first phase, half of them


def build_tower(layers: int = LAYERS) -> CLIPVisionModel:
    """A CLIP tower, twelve layers deep unless told, initialised so that it learns quickly."""
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        image_size=SIDE,
        patch_size=PATCH,
        attn_implementation="eager",  # under bfloat16 on a CPU twice as fast as sdpa
    )
    tower = CLIPVisionModel(config)
    core = _core(tower)
    for layer in core.encoder.layers:
        for name, weight in layer.named_parameters():
            if weight.dim() == 2:
                narrow = "out_proj" in name or "fc2" in name
                nn.init.normal_(weight, std=0.02 if narrow else 0.05)
    nn.init.normal_(core.embeddings.patch_embedding.weight, std=0.05)
    with torch.no_grad():
        core.embeddings.position_embedding.weight[1:] = 0.2 * _waves()
    return tower


def middle(tower: CLIPVisionModel) -> tuple[int, ...]:
    """The layers MIDDLE of this tower, from 1: 4 and 5 of 12, 3 and 4 of 8."""
    return MIDDLE.at(len(_core(tower).encoder.layers))


def build_projector() -> nn.Sequential:
    """LLaVA's `mlp2x_gelu`, with its parameter names."""
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))


def _core(tower: CLIPVisionModel) -> nn.Module:
    return getattr(tower, "vision_model", tower)  # transformers 4 wraps it


def _waves() -> Tensor:
    """Sine and cosine of a patch's row and column, (N, WIDTH)."""
    steps = torch.arange(GRID) - (GRID - 1) / 2
    angles = steps[:, None] / 40 ** (torch.arange(WIDTH // 4) / (WIDTH // 4))
    waves = torch.cat([angles.sin(), angles.cos()], 1)
    rows = waves[:, None].expand(GRID, GRID, -1)
    columns = waves[None].expand(GRID, GRID, -1)
    return torch.cat([rows, columns], -1).reshape(GRID**2, WIDTH)


def pixels(images: list) -> Tensor:
    """What `CLIPImageProcessor` makes of images that already have the right size."""
    stack = torch.from_numpy(np.stack([np.asarray(i) for i in images]))
    return (stack.permute(0, 3, 1, 2).float() / 255 - MEAN) / STD


def run_tower(
    tower: CLIPVisionModel, images: Tensor, shown: Tensor | None = None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Patches as LLaVA reads them, one layer before the end; the last CLS; what `middle` reads."""
    core = _core(tower)
    hidden = core.embeddings(images)  # (B, 1 + N, D)
    if shown is not None:
        patches = hidden[:, 1:].gather(1, shown[..., None].expand(-1, -1, WIDTH))
        hidden = torch.cat([hidden[:, :1], patches], 1)
    hidden = core.pre_layrnorm(hidden)
    read = []
    for layer in core.encoder.layers[:-1]:
        read.append(hidden)
        hidden = layer(hidden, attention_mask=None)
    last = core.encoder.layers[-1](hidden, attention_mask=None)
    return hidden[:, 1:], last[:, 0], [read[i - 1] for i in middle(tower)]


def received(tower: CLIPVisionModel, read: list[Tensor]) -> Tensor:
    """Attention each patch receives in the layers `middle`, as HIVTP scores it, (B, N)."""
    layers = _core(tower).encoder.layers
    each = [_received(layers[i - 1], x) for i, x in zip(middle(tower), read, strict=True)]
    return sum(each) / len(each)


def _received(layer: nn.Module, hidden: Tensor) -> Tensor:
    normed = layer.layer_norm1(hidden)
    query, key = (
        projection(normed).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj)
    )
    weights = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).float().softmax(-1)
    return weights.mean((1, 2))[:, 1:]


class Heads(nn.Module):
    """Reads aspects out of projected patches by comparing them with word embeddings."""

    def __init__(self) -> None:
        super().__init__()
        tokenizer = build_tokenizer()
        self.words = nn.Embedding(len(tokenizer), WIDTH)
        nn.init.normal_(self.words.weight, std=0.1)
        self.none = nn.Parameter(torch.randn(len(ASPECTS), WIDTH) * 0.1)
        self.summary = nn.Linear(WIDTH, SUMMARY)
        self.where = nn.Linear(WIDTH, 2)
        self.ids = {a: tokenizer.convert_tokens_to_ids(list(w)) for a, w in ASPECTS.items()}

    def forward(self, projected: Tensor, aspect: str) -> Tensor:
        row = list(ASPECTS).index(aspect)
        classes = torch.cat([self.none[row : row + 1], self.words.weight[self.ids[aspect]]])
        return projected @ classes.T

    def objectness(self, projected: Tensor) -> Tensor:
        """How surely a patch shows a shape or a character, (B, N)."""
        sure = [1 - self(projected, a).softmax(-1)[..., 0] for a in ("shape", "character")]
        return torch.maximum(*sure)


@dataclass(frozen=True)
class Batch:
    """Pictures to learn from; `shown` lists the patches that the tower sees, None means all."""

    images: Tensor
    aspects: dict[str, Tensor]  # (B, P)
    where: Tensor  # (B, P, 2) column and row, about -1.7..1.7
    ink: Tensor  # (B, P)
    contents: Tensor
    shown: Tensor | None


def draw_batch(seed: str, size: int, half: bool) -> Batch:
    """The batch of one step, from its own seed: a resumed run sees the same pictures."""
    rng = random.Random(seed)
    kinds = rng.choices(list(_KINDS), list(_KINDS.values()), k=size)
    pictures = [draw(rng, kind, scale=_scale(rng, kind)) for kind in kinds]
    labels = [label(p) for p in pictures]
    aspects = {a: torch.from_numpy(np.stack([x.aspects[a] for x in labels])) for a in ASPECTS}
    ink = torch.from_numpy(np.stack([x.ink for x in labels]))
    grid = (torch.arange(GRID) - (GRID - 1) / 2) / 3.45  # unit variance
    where = torch.stack([grid.repeat(GRID), grid.repeat_interleave(GRID)], -1)
    where = where.expand(size, -1, -1)
    shown = None
    if half:
        shown = _choose_shown(rng, aspects, ink)
        aspects = {a: v.gather(1, shown) for a, v in aspects.items()}
        ink, where = ink.gather(1, shown), where.gather(1, shown[..., None].expand(-1, -1, 2))
    contents = torch.from_numpy(np.stack([x.contents for x in labels]))
    return Batch(pixels([p.image for p in pictures]), aspects, where, ink, contents, shown)


def _scale(rng: random.Random, kind: str) -> float:
    """Shapes come small and large, as in the thumbnail and the tiles of a high resolution."""
    if kind == "scene":
        return rng.uniform(0.65, 1.5)
    return rng.uniform(0.9, 1.1) if kind == "diagram" else 1.0


def _choose_shown(rng: random.Random, aspects: dict[str, Tensor], ink: Tensor) -> Tensor:
    """Patches with something on them first, then random background, in reading order."""
    noise = torch.rand(ink.shape, generator=torch.Generator().manual_seed(rng.getrandbits(62)))
    rank = 2 * find_things(aspects) + 1.0 * ink + noise
    return rank.topk(_SHOWN, 1).indices.sort(1).values


def find_things(aspects: dict[str, Tensor]) -> Tensor:
    """Which patches show a shape, a box or a character."""
    return torch.stack([aspects[a] > 0 for a in EVERYWHERE]).any(0)


def tower_loss(
    tower: CLIPVisionModel,
    projector: nn.Module,
    heads: Heads,
    batch: Batch,
    guide: float = _GUIDE,
) -> tuple[Tensor, dict[str, float]]:
    """Name every patch with words, place it, attend to things, sum up the picture in CLS.

    Without `guide` the attention is measured and not taught.
    """
    with low_precision():
        patches, cls, read = run_tower(tower, batch.images, batch.shown)
        attention = received(tower, read)
        projected = projector(patches)
        logits = {a: heads(projected, a) for a in ASPECTS}
        summary, where = heads.summary(cls), heads.where(patches)
    loss = 4 * F.binary_cross_entropy_with_logits(summary.float(), batch.contents)
    off = (where.float() - batch.where).square().sum(-1)
    loss = loss + 0.3 * off.mean() + 0.3 * off[batch.ink].mean()
    things = find_things(batch.aspects)
    attended = attention / attention.sum(1, keepdim=True)
    # Middle layers of CLIP attend to objects by themselves; twelve small layers do not.
    if guide:
        loss = loss - guide * attended[things].log().mean()
    scores = {"place_error": off[batch.ink].mean().item()}
    scores["attended"] = (attended * things).sum(1).mean().item()
    for aspect, target in batch.aspects.items():
        part, right = _aspect_loss(logits[aspect].float(), target, aspect in EVERYWHERE)
        loss = loss + _WEIGHTS.get(aspect, 1.0) * part
        if right is not None:
            scores[aspect] = right
    return loss, scores


def _aspect_loss(logits: Tensor, target: Tensor, balance: bool) -> tuple[Tensor, float | None]:
    """Cross-entropy, and the share of right words where there is one to say."""
    there = target > 0
    if not there.any():
        return logits.sum() * 0, None
    right = (logits[there].argmax(-1) == target[there]).float().mean().item()
    if balance:  # background outnumbers everything else: weigh both sides alike
        loss = 0.7 * F.cross_entropy(logits[there], target[there])
        return loss + F.cross_entropy(logits[~there], target[~there]), right
    return F.cross_entropy(logits[target != IGNORE], target[target != IGNORE]), right
