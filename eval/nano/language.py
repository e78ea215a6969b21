"""Stage 2: a small Llama learns to answer from the frozen tower's patches."""

import random
from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import LlamaConfig, LlamaForCausalLM

from eval.nano.draw import LARGE, PINPOINTS, SIDE, draw, draw_large, random_string, random_text
from eval.nano.fit import low_precision
from eval.nano.labels import GRID
from eval.nano.questions import Question, ask
from eval.nano.text import Encoded, build_tokenizer, encode, prefix_ids, prompts
from eval.nano.tower import HEADS, WIDTH, pixels, run_tower
from eval.nano.world import TRAIN_WORDS, Picture

LAYERS = 4
KINDS = {"scene": 0.45, "sign": 0.3, "diagram": 0.25}
QUESTIONS = 6  # about one picture in one step
_MIMETIC = 0.7


def build_language() -> LlamaForCausalLM:
    """A four-layer Llama with tied embeddings."""
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.06,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",
    )
    language = LlamaForCausalLM(config)
    head = WIDTH // HEADS
    with torch.no_grad():
        for layer in language.model.layers:
            # Queries that start alike keys: a word soon attends to the patches that say it.
            shared = torch.cat(
                [torch.linalg.qr(torch.randn(WIDTH, head))[0].T for _ in range(HEADS)]
            )
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                noise = 0.02 * torch.randn(WIDTH, WIDTH)
                projection.weight.copy_(_MIMETIC * shared + noise)
    return language


class Newline(nn.Module):
    """What LLaVA-NeXT puts behind every row of patches of a large image."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(WIDTH))


@dataclass(frozen=True)
class Album:
    """Pictures as the frozen tower sees them, and what may be asked about each."""

    patches: Tensor  # (B, L, WIDTH) bfloat16, in LLaVA's reading order; zeros at a row break
    breaks: Tensor  # (L,) bool, where a row of a large image ends
    likely: Tensor | None  # (B, K) those most like a thing or a character, in reading order
    pictures: list[tuple[str, Picture]]  # (kind, picture without its pixels)


_LIKELY = 40  # patches a tile


@torch.no_grad()
def make_album(parts: nn.ModuleDict, seed: str, size: int, canvas: tuple[int, int] = ()) -> Album:
    """Draw pictures, small ones or of one large canvas, and run the tower over them, once.

    Which patches are likely to hold something is known where `parts` have heads that say so.
    """
    rng = random.Random(seed)
    order = reading_order(canvas) if canvas else torch.arange(GRID**2)
    patches, likely, pictures = [], [], []
    for start in range(0, size, 100):
        drawn = [draw_kind(rng, canvas) for _ in range(min(100, size - start))]
        tiles = [tile for _, picture in drawn for tile in cut(picture.image, canvas)]
        with low_precision():
            seen = torch.cat([run_tower(parts["tower"], t)[0] for t in pixels(tiles).split(100)])
            sure = parts["heads"].objectness(parts["projector"](seen)) if "heads" in parts else None
        seen = seen.unflatten(0, (len(drawn), -1)).flatten(1, 2)
        there = (order >= 0).float()
        patches.append((seen[:, order] * there[:, None]).to(torch.bfloat16))
        if sure is not None:
            sure = sure.unflatten(0, (len(drawn), -1)).flatten(1, 2)
            count = _LIKELY * (2 if canvas else 1)
            likely.append((sure[:, order] * there).topk(count, 1).indices.sort(1).values)
        for _, picture in drawn:
            picture.image = picture.ink = None
        pictures += drawn
    best = torch.cat(likely) if likely else None
    return Album(torch.cat(patches), order < 0, best, pictures)


def cut(image: Image.Image, canvas: tuple[int, int]) -> list[Image.Image]:
    """The image itself, or its thumbnail and tiles as LLaVA-NeXT cuts them."""
    if not canvas:
        return [image]
    from llava.mm_utils import divide_to_patches, resize_and_pad_image, select_best_resolution

    padded = resize_and_pad_image(image, select_best_resolution(canvas, PINPOINTS))
    return [image.resize((SIDE, SIDE)), *divide_to_patches(padded, SIDE)]


def reading_order(canvas: tuple[int, int]) -> Tensor:
    """Which patch of which tile LLaVA-NeXT reads when, counted through; -1 is a row break."""
    from llava.mm_utils import get_anyres_image_grid_shape

    from llava_hivtp.anyres import merge_anyres
    from llava_hivtp.model import unpadded
    from llava_hivtp.vision import KeptTokens

    grid = get_anyres_image_grid_shape(canvas, PINPOINTS, SIDE)
    tiles = 1 + grid[0] * grid[1]
    number = torch.arange(tiles * GRID**2)
    kept = KeptTokens(number[:, None].float(), number // GRID**2, number % GRID**2)
    frame = unpadded(GRID, grid, canvas)
    packed = merge_anyres(kept.tokens, kept, GRID, grid, frame, torch.tensor([-1.0]))
    return packed.tokens[:, 0].long()


def draw_kind(rng: random.Random, canvas: tuple[int, int] = ()) -> tuple[str, Picture]:
    kinds = {k: w for k, w in KINDS.items() if k != "diagram" or canvas in ((), LARGE[0])}
    (kind,) = rng.choices(list(kinds), list(kinds.values()))
    text = random_string(rng) if rng.random() < 0.5 else random_text(rng, TRAIN_WORDS)
    if canvas:
        return kind, draw_large(rng, kind, canvas, text=text)
    return kind, draw(rng, kind, text=text)


def questions_about(
    album: Album, rows: list[int], rng: random.Random, hints: bool, easy: bool = False
) -> tuple[list[list[Encoded]], list[list[str]]]:
    """Several questions about each picture, with the name of what each one tests."""
    encoded, names = [], []
    for row in rows:
        kind, picture = album.pictures[row]
        asked = ask(rng, picture, kind, QUESTIONS, easy)
        encoded.append([_encode(rng, question, hints) for question in asked])
        names.append([_name(question) for question in asked])
    return encoded, names


def _encode(rng: random.Random, question: Question, hints: bool) -> Encoded:
    return encode(question, rng.choice(prompts(question, hinted=True)), 1.0 if hints else 0.0)


def _name(question: Question) -> str:
    return question.family + ("_choice" if question.options else "")


@dataclass(frozen=True)
class Packed:
    """All questions of a picture in one row: they see the picture and not each other."""

    ids: Tensor  # (B, L)
    block: Tensor  # (B, L) which question a token belongs to, from 1; 0 is padding
    position: Tensor  # (B, L) counted from the end of the picture
    row: Tensor  # of every prediction: its row, its column, the token and the weight
    column: Tensor
    token: Tensor
    weight: Tensor


def pack(questions: list[list[Encoded]]) -> Packed:
    length = max(sum(len(e.ids) for e in row) for row in questions)
    ids, block, position = (torch.zeros(len(questions), length, dtype=torch.long) for _ in range(3))
    predictions: list[tuple[int, int, int, float]] = []
    for i, row in enumerate(questions):
        start = 0
        for number, question in enumerate(row):
            end = start + len(question.ids)
            ids[i, start:end] = torch.tensor(question.ids)
            block[i, start:end] = number + 1
            position[i, start:end] = torch.arange(end - start)
            predictions += [(i, start + at, token, w) for at, token, w in question.targets]
            start = end
    rows, columns, tokens, weights = zip(*predictions, strict=True)
    index = [torch.tensor(x) for x in (rows, columns, tokens)]
    return Packed(ids, block, position, *index, torch.tensor(weights))


@dataclass(frozen=True)
class Shown:
    """The patches of a batch that the language model sees."""

    patches: Tensor  # (B, L, WIDTH)
    breaks: Tensor  # (B, L) bool
    size: Tensor | None = None  # (B, L) patches that each is attended to as, 0: padding; None: 1
    place: Tensor | None = None  # (B, L) position in the picture; None: one behind the other
    span: Tensor | None = None  # (B,) positions that the picture takes; None: L


def predict(learning: nn.ModuleDict, shown: Shown, packed: Packed) -> Tensor:
    """Logits at every place of `packed` where something is to be predicted."""
    language = learning["language"]
    embed = language.get_input_embeddings()
    batch, seen, _ = shown.patches.shape
    prefix = torch.tensor(prefix_ids()).expand(batch, -1)
    visual = learning["projector"](shown.patches.float())
    if shown.breaks.any():
        visual = torch.where(shown.breaks[..., None], learning["newline"].value, visual)
    inputs = torch.cat([embed(prefix), visual.to(embed.weight.dtype), embed(packed.ids)], 1)
    before = prefix.shape[1] + seen
    block = torch.cat([torch.zeros(batch, before, dtype=torch.long), packed.block], 1)
    position = torch.arange(before).expand(batch, -1)
    if shown.place is not None:
        start = prefix.shape[1]
        position = torch.cat([position[:, :start], start + shown.place], 1)
    end = before if shown.span is None else prefix.shape[1] + shown.span[:, None]
    position = torch.cat([position, end + packed.position], 1)
    mask = _mask(block, before)
    if shown.size is not None:
        seen_as = shown.size.log().clamp(min=-1e4)[:, None, None]
        mask = mask + pad(seen_as, (prefix.shape[1], packed.ids.shape[1]))
    hidden = language.model(
        inputs_embeds=inputs,
        attention_mask=mask,
        position_ids=position,
        use_cache=False,
    ).last_hidden_state[:, before:]
    return language.lm_head(hidden[packed.row, packed.column]).float()


def _mask(block: Tensor, before: int) -> Tensor:
    """A token sees what precedes it in the picture and in its own question."""
    length = block.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool).tril()
    shared = torch.zeros(length, dtype=torch.bool)
    shared[:before] = True
    same = block[:, :, None] == block[:, None, :]
    allowed = earlier & (same | shared[None, None, :])
    return torch.zeros(allowed.shape).masked_fill(~allowed, -1e4)[:, None]


def show_all(album: Album, rows: list[int]) -> Shown:
    return Shown(album.patches[rows], album.breaks.expand(len(rows), -1))


def show_some(album: Album, rows: list[int], rng: random.Random, early: bool) -> Shown:
    """Patches for one step: the likely ones early; later all, or a random share."""
    shown = show_all(album, rows)
    length = shown.breaks.shape[1]
    if early:
        index = album.likely[rows]
    elif rng.random() < (0.6 if length == GRID**2 else 0.25):  # many tiles are slow
        return shown
    else:
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        noise = torch.rand(shown.breaks.shape, generator=generator)
        share = rng.choice((0.25, 0.33, 0.42, 0.5, 0.63, 0.75))
        index = noise.topk(int(share * length), 1).indices.sort(1).values
    patches = shown.patches.gather(1, index[..., None].expand(-1, -1, WIDTH))
    return Shown(patches, shown.breaks.gather(1, index))


def language_loss(learning: nn.ModuleDict, shown: Shown, packed: Packed) -> Tensor:
    with low_precision():
        logits = predict(learning, shown, packed)
    losses = F.cross_entropy(logits, packed.token, reduction="none")
    return (losses * packed.weight).sum() / packed.weight.sum()


@torch.no_grad()
def accuracy(learning: nn.ModuleDict, album: Album, seed: str = "check") -> dict[str, float]:
    """Share of right answers by kind of question, every token right, hints left out."""
    rng = random.Random(seed)
    right: dict[str, list[bool]] = defaultdict(list)
    rows = list(range(len(album.pictures)))
    for start in range(0, len(rows), 25):
        some = rows[start : start + 25]
        encoded, names = questions_about(album, some, rng, hints=False)
        packed = pack(encoded)
        with low_precision():
            best = predict(learning, show_all(album, some), packed).argmax(-1)
        hits, at = (best == packed.token).tolist(), 0
        for row, labels in zip(encoded, names, strict=True):
            for question, name in zip(row, labels, strict=True):
                right[name].append(all(hits[at : at + len(question.targets)]))
                at += len(question.targets)
    return {name: round(sum(hits) / len(hits), 4) for name, hits in sorted(right.items())}
