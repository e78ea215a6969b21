"""Methods beside one another on every tower of the family, in one pass without lmms-eval."""

import json
import random
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from eval.nano.draw import draw
from eval.nano.exam import Item
from eval.nano.labels import GRID
from eval.nano.language import Shown, pack, predict
from eval.nano.tower import pixels
from eval.results.means import Scored
from eval.results.stats import Groups
from llava_hivtp import build_pruner, load
from llava_hivtp.importance import received_attention
from llava_hivtp.merging import merge_dropped
from llava_hivtp.pruners import for_depth
from llava_hivtp.pruners.base import PaperLayers, Pruner
from llava_hivtp.vision import KeptTokens, VisionFeatures, encode_tiles

CHUNK = 40  # pictures at a time
BUDGETS = {25: 36, 17: 24, 11: 16, 6: 8}  # percent -> patches of 144
_HIVTP = {25: (14, 3), 17: (6, 3), 11: (9, 6), 6: (3, 6)}  # percent -> k, c
PEERS = ("scope", "divprune", "vispruner", "holov", "random", "uniform")
OURS = "cover"
ABLATED = {  # row -> fields of ours
    "cover by received attention": {"importance": "received", "layers": PaperLayers((7, 8, 9, 10))},
    "cover without importance": {"importance": "equal"},
}


def build_rows() -> dict[str, Pruner]:
    """Row -> method, `hivtp-11`; each keeps exactly the tokens of its budget."""
    rows = {}
    for percent, patches in BUDGETS.items():
        keep = round(patches / 144 + 0.001, 3)
        k, c = _HIVTP[percent]
        rows[f"hivtp-{percent}"] = build_pruner("hivtp", r=2, k=k, c=c, fill=True)
        for name in (OURS, *PEERS):
            rows[f"{name}-{percent}"] = build_pruner(name, keep=keep)
        for row, fields in ABLATED.items():
            rows[f"{row}-{percent}"] = replace(rows[f"{OURS}-{percent}"], **fields)
    return rows


class Model:
    """A small LLaVA from its checkpoint, in float32."""

    def __init__(self, folder: Path) -> None:
        model, *_ = load(str(folder))
        self.tower = model.get_vision_tower().vision_tower
        self.depth = self.tower.config.num_hidden_layers
        projector = model.get_model().mm_projector
        self.learning = nn.ModuleDict({"language": model, "projector": projector})

    @torch.no_grad()
    def see(self, images: list[Image.Image]) -> VisionFeatures:
        """Pictures as the tiles of one image: every method here chooses in each as if alone."""
        images = pixels(images)
        layers = range(1, self.depth + 1)
        hidden, tap = encode_tiles(self.tower, images, self.depth - 1, layers)
        seen = VisionFeatures(hidden[:, 1:], hidden[:, 0], tap.queries, tap.keys)
        return self.learning["language"].with_projector(seen)

    @torch.no_grad()
    def right(self, shown: Shown, items: Sequence[Item]) -> list[int]:
        """Whether each question is answered right from what is shown of its picture, 1 or 0."""
        encoded = [item.encoded() for item in items]
        packed = pack([[one] for one in encoded])
        best = predict(self.learning, shown, packed).argmax(-1)
        hits, start, found = (best == packed.token).tolist(), 0, []
        for one in encoded:
            found.append(int(all(hits[start : start + len(one.targets)])))
            start += len(one.targets)
        return found


def show(patches: Tensor) -> Shown:
    """(B, K, D) patches, K of every picture, as the language model sees them."""
    return Shown(patches, torch.zeros(patches.shape[:2], dtype=torch.bool))


def show_kept(pictures: Sequence[KeptTokens], weigh: bool, place: bool) -> Shown:
    """What was kept of every picture, padded to the longest.

    Args:
        pictures: of one tile each.
        weigh: attend to a token as to the patches it stands for.
        place: let tokens keep their positions, and the text behind them its own.
    """
    patches = pad_sequence([kept.tokens for kept in pictures], batch_first=True)
    spans = torch.tensor([GRID**2 if place else len(kept) for kept in pictures])
    if not weigh and not place and len(set(spans.tolist())) == 1:
        return show(patches)
    sizes = [kept.size if weigh else torch.ones(len(kept)) for kept in pictures]
    places = [kept.centre if place else torch.arange(len(kept)) for kept in pictures]
    size, places = (pad_sequence(each, batch_first=True) for each in (sizes, places))
    return replace(show(patches), size=size, place=places, span=spans)


def answer(
    folder: Path,
    items: Sequence[Item],
    rows: dict[str, Pruner],
    file: Path,
    in_place: Collection[str] = (),
) -> dict[str, list[int]]:
    """Which of the questions every row answers right; what `file` holds already is not asked again.

    Rows `full` and `blind` are added: all patches, and those of an empty picture. Of the rows that
    vary by picture `ROW tokens` is how many it kept of each. Tokens of rows `in_place` keep their
    positions.
    """
    varying = {tokens_of(row) for row, pruner in rows.items() if pruner.varies_by()}
    chunks = [items[start : start + CHUNK] for start in range(0, len(items), CHUNK)]
    lines = [json.loads(x) for x in file.read_text().splitlines()] if file.is_file() else []
    if any(set(line) != {*rows, *varying, "full", "blind"} for line in lines):
        raise ValueError(f"{file} holds other rows: give another folder or delete it")
    file.parent.mkdir(parents=True, exist_ok=True)
    if len(lines) < len(chunks):
        model = Model(folder)
        own = {row: for_depth(pruner, model.depth) for row, pruner in rows.items()}
        for chunk in chunks[len(lines) :]:
            lines.append(_answer_chunk(model, chunk, own, in_place))
            with file.open("a") as out:
                out.write(json.dumps(lines[-1]) + "\n")
    return {row: [hit for line in lines for hit in line[row]] for row in lines[0]}


def tokens_of(row: str) -> str:
    """What the numbers of tokens of a row are called beside its answers."""
    return f"{row} tokens"


@torch.no_grad()
def _answer_chunk(
    model: Model, items: Sequence[Item], rows: dict[str, Pruner], in_place: Collection[str]
) -> dict[str, list[int]]:
    seen = model.see([item.picture.image for item in items])
    nothing = model.see([draw(random.Random(0), "blank").image]).tokens.expand_as(seen.tokens)
    whole = {"full": seen.tokens, "blind": nothing}
    found = {row: model.right(show(patches), items) for row, patches in whole.items()}
    for row, pruner in rows.items():
        kept = pruner.select(seen)
        if pruner.merge or pruner.weigh:
            kept = merge_dropped(kept, seen, pruner.merge)
        pictures = kept.split([1] * len(items))
        found[row] = model.right(show_kept(pictures, pruner.weigh, row in in_place), items)
        if pruner.varies_by():
            found[tokens_of(row)] = [len(each) for each in pictures]
    return found


def scored(items: Sequence[Item], right: Sequence[int], sets: Sequence[str]) -> Scored:
    """Right answers by set, two questions about one picture in one group."""
    found = {}
    for name in sets:
        sums: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for item, hit in zip(items, right, strict=True):
            if item.set == name:
                group = sums[f"{id(item.picture)}"]
                group[0], group[1] = group[0] + hit, group[1] + 1
        y, n = np.array(list(sums.values()), dtype=float).T
        keys = tuple(("", f"{i:05d}") for i in range(len(y)))
        found[name] = Groups(keys, y, n, {})
    return found


@torch.no_grad()
def attended(folder: Path, items: Sequence[Item]) -> list[float]:
    """By layer: how well received attention finds the patches a question is about.

    The mean over questions of the area under the curve: 0.5 is chance. Questions that name nothing
    in the picture are left out.
    """
    model = Model(folder)
    layers = range(1, model.depth + 1)
    areas: list[list[float]] = [[] for _ in layers]
    for start in range(0, len(items), CHUNK):
        some = items[start : start + CHUNK]
        seen = model.see([item.picture.image for item in some])
        about = np.stack([item.patches() for item in some])
        for layer in layers:
            scores = received_attention(seen, (layer,)).numpy()
            pairs = zip(scores, about, strict=True)
            areas[layer - 1] += [_area(s, a) for s, a in pairs if a.any() and not a.all()]
    return [float(np.mean(each)) for each in areas]


def _area(scores: np.ndarray, about: np.ndarray) -> float:
    """Chance that a patch it is about scores above one it is not; ties count half."""
    above = scores[about][:, None] - scores[~about][None]
    return float(((above > 0) + 0.5 * (above == 0)).mean())
