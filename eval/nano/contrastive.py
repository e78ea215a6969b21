"""What a tower learns from captions alone: which caption of a batch belongs to which picture."""

import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionModel

from eval.nano.draw import SIDE, draw, random_string, random_text
from eval.nano.fit import low_precision
from eval.nano.labels import GRID
from eval.nano.text import build_tokenizer
from eval.nano.tower import HEADS, WIDTH, pixels, run_tower
from eval.nano.world import TRAIN_WORDS, Picture, Thing, locate

BATCH = 64
_KINDS = {"scene": 0.6, "sign": 0.2, "diagram": 0.2}
_READER_LAYERS = 2
_LONGEST = 80  # tokens of a caption
_COLDEST = 100.0  # what similarities are multiplied with at most, as in CLIP


def caption(picture: Picture, colored: bool = True, placed: bool = True) -> str:
    """What is drawn in a picture, in words; colours and places can be left out."""
    parts = [_describe(thing, colored, placed) for thing in picture.shapes]
    for box in picture.boxes:
        parts.append(_describe(box, colored, placed, "box "))
        if box.target:
            parts.append(f"arrow from {box.name} to {box.target}")
    if picture.sign:
        x, y = np.mean([at[2:] for at in picture.letters], 0).tolist()
        where = _where(*locate(x, y, SIDE, SIDE)) if placed else ""
        parts.append(f'sign "{picture.sign}"{where}')
    return ", ".join(parts)


def _describe(thing: Thing, colored: bool, placed: bool, before: str = "") -> str:
    color = f"{thing.color} " if colored else ""
    return f"{color}{before}{thing.name}" + (_where(thing.side, thing.height) if placed else "")


def _where(side: str | None, height: str | None) -> str:
    words = [word for word in (height, side) if word]
    return f" at {' '.join(words)}" if words else ""


class Matcher(nn.Module):
    """Embeds captions and the CLS of pictures in one space; the temperature is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(len(build_tokenizer()), WIDTH)
        nn.init.normal_(self.words.weight, std=0.1)
        self.order = nn.Parameter(0.02 * torch.randn(_LONGEST, WIDTH))
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 2 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.reader = nn.TransformerEncoder(layer, _READER_LAYERS, enable_nested_tensor=False)
        self.read, self.seen = _build_head(), _build_head()
        self.scale = nn.Parameter(torch.tensor(5.0).log())

    def forward(self, cls: Tensor, captions: Tensor, there: Tensor) -> Tensor:
        """Similarity of every picture (B, WIDTH) with every caption (B, L) of tokens, (B, B)."""
        hidden = self.words(captions) + self.order[: captions.shape[1]]
        hidden = self.reader(hidden, src_key_padding_mask=~there)
        mean = (hidden * there[..., None]).sum(1) / there.sum(1, keepdim=True)
        pictures, texts = F.normalize(self.seen(cls).float()), F.normalize(self.read(mean).float())
        return self.scale.exp().clamp(max=_COLDEST) * pictures @ texts.T


def _build_head() -> nn.Sequential:
    """To the common space, less what the whole batch shares: at first that is nearly all."""
    norm = nn.BatchNorm1d(WIDTH, affine=False)
    return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH, bias=False), norm)


@dataclass(frozen=True)
class Pairs:
    """Pictures and their captions; `shown` lists the patches the tower sees, None means all."""

    images: Tensor
    captions: Tensor  # (B, L) tokens
    there: Tensor  # (B, L) bool, False is padding
    shown: Tensor | None


def draw_pairs(seed: str, size: int, half: bool, easy: bool = False) -> Pairs:
    """The batch of one step, from its own seed.

    Unless `easy`, all pictures are of one kind and all captions say the same sorts of facts: where
    colours are left out, shapes must be seen.
    """
    rng = random.Random(seed)
    kinds = rng.choices(list(_KINDS), list(_KINDS.values()), k=size if easy else 1)
    pictures = [_draw(rng, kinds[i % len(kinds)]) for i in range(size)]
    colored, placed = (easy or rng.random() < 0.5 for _ in range(2))
    texts = [caption(picture, colored, placed) for picture in pictures]
    tokens = build_tokenizer()(
        texts, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt"
    )
    shown = None
    if half:  # at random, as in FLIP (arXiv 2212.00794): twice as fast
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        noise = torch.rand(size, GRID**2, generator=generator)
        shown = noise.topk(GRID**2 // 2, 1).indices.sort(1).values
    images = pixels([picture.image for picture in pictures])
    return Pairs(images, tokens.input_ids, tokens.attention_mask.bool(), shown)


def _draw(rng: random.Random, kind: str) -> Picture:
    text = random_string(rng) if rng.random() < 0.5 else random_text(rng, TRAIN_WORDS)
    return draw(rng, kind, text=text)


def contrastive_loss(
    tower: CLIPVisionModel, matcher: Matcher, pairs: Pairs
) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy of the right caption of every picture and the right picture of every caption.

    The loss of CLIP (arXiv 2103.00020). Nothing is said of patches or of attention.
    """
    with low_precision():
        _, cls, _ = run_tower(tower, pairs.images, pairs.shown)
        similar = matcher(cls, pairs.captions, pairs.there)
    similar = similar.float()
    own = torch.arange(len(similar))
    loss = (F.cross_entropy(similar, own) + F.cross_entropy(similar.T, own)) / 2
    right = (similar.argmax(1) == own).float().mean().item()
    return loss, {"retrieved": right, "scale": matcher.scale.exp().item()}
