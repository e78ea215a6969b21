"""Stage 2: a small Llama learns to answer from the frozen tower's patches."""

import math
import random
from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from eval.nano.draw import draw, random_string, random_text
from eval.nano.questions import Question, ask
from eval.nano.text import Encoded, build_tokenizer, encode, prefix_ids, prompts
from eval.nano.tower import HEADS, WIDTH, Heads, pixels, run_tower
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


@dataclass(frozen=True)
class Album:
    """Pictures as the frozen tower sees them, and what may be asked about each."""

    patches: Tensor  # (B, N, WIDTH) bfloat16
    likely: Tensor  # (B, K) the patches most like a thing or a character, in reading order
    pictures: list[tuple[str, Picture]]  # (kind, picture without its pixels)


_LIKELY = 40  # patches


@torch.no_grad()
def make_album(
    tower: CLIPVisionModel, projector: nn.Module, heads: Heads, seed: str, size: int
) -> Album:
    """Draw pictures and run the tower over them, once."""
    rng = random.Random(seed)
    patches, likely, pictures = [], [], []
    for start in range(0, size, 100):
        drawn = [draw_kind(rng) for _ in range(min(100, size - start))]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            seen, _ = run_tower(tower, pixels([p.image for _, p in drawn]))
            sure = heads.objectness(projector(seen))
        patches.append(seen.to(torch.bfloat16))
        likely.append(sure.topk(_LIKELY, 1).indices.sort(1).values)
        for _, picture in drawn:
            picture.image = picture.ink = None
        pictures += drawn
    return Album(torch.cat(patches), torch.cat(likely), pictures)


def draw_kind(rng: random.Random) -> tuple[str, Picture]:
    (kind,) = rng.choices(list(KINDS), list(KINDS.values()))
    text = random_string(rng) if rng.random() < 0.5 else random_text(rng, TRAIN_WORDS)
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


def predict(
    language: LlamaForCausalLM, projector: nn.Module, patches: Tensor, packed: Packed
) -> Tensor:
    """Logits at every place of `packed` where something is to be predicted."""
    embed = language.get_input_embeddings()
    batch, seen, _ = patches.shape
    prefix = torch.tensor(prefix_ids()).expand(batch, -1)
    visual = projector(patches.float())
    inputs = torch.cat([embed(prefix), visual.to(embed.weight.dtype), embed(packed.ids)], 1)
    before = prefix.shape[1] + seen
    block = torch.cat([torch.zeros(batch, before, dtype=torch.long), packed.block], 1)
    position = torch.arange(before).expand(batch, -1)
    position = torch.cat([position, before + packed.position], 1)
    hidden = language.model(
        inputs_embeds=inputs,
        attention_mask=_mask(block, before),
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


def choose_patches(
    album: Album, rows: list[int], rng: random.Random, done: float, drop: bool
) -> Tensor:
    """The patches shown in one step: likely ones at first, later all, sometimes a random share.

    A model trained without `drop` always sees all of them.
    """
    patches = album.patches[rows]
    if not drop:
        return patches
    if done < 0.45:
        index = album.likely[rows]
    elif rng.random() < 0.6:
        return patches
    else:
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        noise = torch.rand(patches.shape[:2], generator=generator)
        share = rng.choice((0.25, 0.33, 0.42, 0.5, 0.63, 0.75))
        index = noise.topk(int(share * patches.shape[1]), 1).indices.sort(1).values
    return patches.gather(1, index[..., None].expand(-1, -1, WIDTH))


def language_loss(
    language: LlamaForCausalLM, projector: nn.Module, patches: Tensor, packed: Packed
) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = predict(language, projector, patches, packed)
    losses = F.cross_entropy(logits, packed.token, reduction="none")
    return (losses * packed.weight).sum() / packed.weight.sum()


@torch.no_grad()
def accuracy(
    language: LlamaForCausalLM, projector: nn.Module, album: Album, seed: str = "check"
) -> dict[str, float]:
    """Share of right answers by kind of question, every token right, hints left out."""
    rng = random.Random(seed)
    right: dict[str, list[bool]] = defaultdict(list)
    rows = list(range(len(album.pictures)))
    for start in range(0, len(rows), 25):
        some = rows[start : start + 25]
        encoded, names = questions_about(album, some, rng, hints=False)
        packed = pack(encoded)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            best = predict(language, projector, album.patches[some], packed).argmax(-1)
        hits, at = (best == packed.token).tolist(), 0
        for row, labels in zip(encoded, names, strict=True):
            for question, name in zip(row, labels, strict=True):
                right[name].append(all(hits[at : at + len(question.targets)]))
                at += len(question.targets)
    scores = {name: sum(hits) / len(hits) for name, hits in sorted(right.items())}
    return {name: round(score, 4) for name, score in scores.items() if not math.isnan(score)}
