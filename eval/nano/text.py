"""The tokenizer of the embedded model, and prompts as lmms-eval and LLaVA spell them."""

import functools
import re
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from eval.nano.questions import CONTINUED, Question, split_hints
from eval.nano.world import CHARACTERS, COLORS, NUMBERS, ORDINALS, SHAPES, plural

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
SEVERAL = "There are several options:"
# Sentences that never vary are one token each: a small model need not spell them out.
SENTENCES = (SYSTEM, SHORT, LETTER, SEVERAL, "USER:", "ASSISTANT:")

_WORDS = """
? . : , " Yes No Is Are On What Which Where How Objects Context
there a an in the image only circle of on at side to or left right top bottom above below what
color shape object objects is are these picture sign say written does word which many box letter
arrow from point floats sinks float sink
"""
_SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")


def vocabulary() -> list[str]:
    """Every token in the order of its id; sentences follow as added tokens."""
    plurals = [plural(s) for s in SHAPES]
    words = [*_SPECIAL, *_WORDS.split(), *COLORS, *SHAPES, *plurals, *NUMBERS, *ORDINALS]
    words += [*CHARACTERS, *(CONTINUED + c for c in CHARACTERS)]
    return list(dict.fromkeys(words))


@functools.cache
def build_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words; anything else in capitals and digits is spelled out, `C ##A ##T`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    words = {word: i for i, word in enumerate(vocabulary())}
    backend = Tokenizer(
        models.WordPiece(words, unk_token="<unk>", continuing_subword_prefix=CONTINUED)
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    backend.decoder = decoders.WordPiece(prefix=CONTINUED)
    backend.add_special_tokens([AddedToken(t, special=True) for t in _SPECIAL])
    backend.add_tokens([AddedToken(s, normalized=False) for s in SENTENCES])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", words["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=2048,
        padding_side="left",
    )


def prompts(question: Question, hinted: bool = False) -> list[str]:
    """The texts after the image, as every official task that could ask this would put them."""
    text = question.hinted if hinted else question.text
    if not question.options:
        bare = text.startswith("what")  # OCRBench adds nothing to its questions
        return [text if bare else f"{text}\n{SHORT}"]
    options = question.hinted_options if hinted else question.options
    lines = "\n".join(f"{letter}. {o}" for letter, o in zip("ABCD", options, strict=False))
    context = f"Context: {question.context}\n" if question.context else ""
    science = f"{context}{text}\n{lines}\n{LETTER}"
    if context or len(options) < 4:
        return [science]
    return [science, f"{text} {SEVERAL}\n{lines}\n\n{LETTER}"]


@dataclass(frozen=True)
class Encoded:
    """One question and its answer as tokens, with what each token should predict."""

    ids: list[int]
    targets: list[tuple[int, int, float]]  # (index into ids, token predicted there, weight)
    answer: tuple[int, int]  # where the answer's predictions start and end, in ids


def encode(question: Question, prompt: str, hint_weight: float = 1.0) -> Encoded:
    """Tokens of a hinted prompt and its answer; hints become predictions of their own."""
    pieces = [(text, facts) for text, facts in split_hints(f"{prompt} ASSISTANT:") if text]
    ids: list[int] = []
    targets: list[tuple[int, int, float]] = []
    for text, facts in pieces:
        ids += _ids(text)
        if hint_weight:
            targets += [(len(ids) - 1, _id(f), hint_weight / len(facts)) for f in facts]
    start = len(ids) - 1
    answer = [*_ids(question.answer), _id("</s>")]
    targets += [(start + i, token, 1.0) for i, token in enumerate(answer)]
    return Encoded(ids + answer[:-1], targets, (start, start + len(answer)))


def prefix_ids() -> list[int]:
    """What stands before the image: start, system sentence, `USER:`."""
    return [_id("<s>"), *_ids(f"{SYSTEM} USER: ")]


def unknown_words(text: str) -> list[str]:
    """Words of a text that the embedded model has no token for."""
    for sentence in SENTENCES:
        text = text.replace(sentence, "")
    return [word for word in re.findall(r"\w+", text) if _id("<unk>") in _ids(word)]


def _id(token: str) -> int:
    return build_tokenizer().convert_tokens_to_ids(token)


@functools.lru_cache(maxsize=200_000)
def _ids(text: str) -> list[int]:
    return build_tokenizer()(text, add_special_tokens=False).input_ids
