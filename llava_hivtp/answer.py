"""Questions about images, answered: prompt, generation, counts and times, in one place."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import torch
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.mm_utils import tokenizer_image_token
from PIL import Image
from transformers import LogitsProcessorList

from llava_hivtp.conversation import build_prompt, template_name
from llava_hivtp.images import fit_images, open_image, prepare_images
from llava_hivtp.limits import Limits

PINS = ("cuda",)  # devices to which a copy out of page-locked memory runs beside the host


@dataclass(frozen=True)
class Request:
    """A question about images."""

    question: str  # marks <image> where it places its images; otherwise they are put in front
    options: Mapping[str, Any] = field(default_factory=dict)  # of `generate`, and `until`
    images: tuple[Image.Image, ...] = ()
    other: str = ""  # question about another image, by which a method with question=other chooses


@dataclass(frozen=True)
class Answer:
    """What the model said, what it saw of the images, and how long it took if that was asked.

    Times are seconds on the host. The clock starts when pixels and prompt are prepared.
    """

    text: str
    generated: int  # tokens, the end mark included
    patches: int = 0  # patch, merged and CLS tokens of the images in the language model
    newlines: int = 0
    total: int = 0  # patch tokens had nothing been pruned
    preparation: float | None = field(default=None, compare=False)  # before the clock starts
    ttft: float | None = field(default=None, compare=False)  # to the first token on the host
    seconds: float | None = field(default=None, compare=False)  # to the whole answer
    # Patches that a layer of the language model read and cached, on average; None: all `patches`.
    mean_per_layer: float | None = None


def answer(
    model: Any,
    tokenizer: Any,
    image: Image.Image | str | Path | IO[bytes],
    question: str,
    *,
    template: str | None = None,
    max_new_tokens: int = 64,
    limits: Limits = Limits(),
) -> Answer:
    """Answer greedily under `model.pruner`, in the conversation the checkpoint was trained on.

    Args:
        model: a LLaVA with a pruner attached, as `load` gives it.
        tokenizer: as `load` gives it.
        image: a file, or an image already open.
        question: without the image mark; it is put in front.
        template: one of LLaVA's conversation templates; default by the checkpoint's name.
        max_new_tokens: the longest answer.
        limits: how large and how thin an image may be.

    Raises:
        TypeError, ValueError: for a question, image or setting that is none, and as `answer_batch`.
    """
    if not isinstance(question, str):
        raise TypeError(f"a question is text, got {question!r}")
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be a whole number from 1, got {max_new_tokens!r}")
    image = image if isinstance(image, Image.Image) else open_image(image, limits)
    name = template_name(model.config._name_or_path, model.config, template)
    request = Request(question, {"max_new_tokens": max_new_tokens}, (image,))
    (found,) = answer_batch(model, tokenizer, [request], name, timed=True, limits=limits)
    return replace(found, text=found.text.strip())


def answer_batch(
    model: Any,
    tokenizer: Any,
    requests: Sequence[Request],
    template: str,
    *,
    timed: bool = False,
    limits: Limits = Limits(),
) -> list[Answer]:
    """Answer requests as one batch: `prepare_batch`, then `answer_prepared`."""
    prepared = prepare_batch(model, tokenizer, requests, template, limits=limits)
    return answer_prepared(model, tokenizer, prepared, timed=timed)


@dataclass(frozen=True)
class Prepared:
    """A batch of requests as the model takes it, on the CPU; for a GPU in page-locked memory."""

    requests: tuple[Request, ...]
    given: dict[str, Any]  # arguments of `generate`: ids as `inputs`, their mask, pixels, sizes
    others: list[torch.Tensor] | None  # prompts of the other questions, if the method wants them
    seconds: float  # that this took


def prepare_batch(
    model: Any,
    tokenizer: Any,
    requests: Sequence[Request],
    template: str,
    *,
    limits: Limits = Limits(),
) -> Prepared:
    """Pixels and prompts of a batch. Reads the model's settings only: another thread may do it.

    Args:
        model: a LLaVA with a pruner attached.
        tokenizer: as `load` gives it.
        requests: of equal options; all of them with images or none.
        template: one of LLaVA's conversation templates.
        limits: how large and how thin an image may be.

    Raises:
        ValueError: if options differ, a question places another number of images than it has, or
            an image is not fit.
    """
    if any(request.options != requests[0].options for request in requests):
        raise ValueError("a batch shares its options; these requests differ in theirs")
    begun = time.perf_counter()
    if model.chat is None:
        given = _by_template(model, tokenizer, requests, template, limits)
    else:
        given = _by_chat(model, requests, limits)
    others = _others(model, tokenizer, requests, template)
    if model.device.type in PINS:
        given = {name: _pinned(value) for name, value in given.items()}
    return Prepared(tuple(requests), given, others, time.perf_counter() - begun)


@torch.inference_mode()
def answer_prepared(
    model: Any, tokenizer: Any, prepared: Prepared, *, timed: bool = False
) -> list[Answer]:
    """Answer a batch, greedily unless its options say otherwise.

    The highest logit of every token generated must be a number: NaN or infinity in projector or
    language model raises. On a GPU that is looked at once, when the answers are there.

    Args:
        model: a LLaVA with a pruner attached.
        tokenizer: as `load` gives it.
        prepared: the batch.
        timed: note the times, those of the batch. Not with beams.

    Raises:
        ValueError: if the model does not give numbers.
    """
    requests = prepared.requests
    options = {"do_sample": False, **requests[0].options}
    until = stop_strings(options.pop("until", None))
    given = dict(prepared.given)
    # Pixels stay: the model casts them itself.
    ids = given.pop("inputs").to(model.device, non_blocking=True)
    given["attention_mask"] = given["attention_mask"].to(model.device, non_blocking=True)
    clock, sound, start = _FirstToken(), _Sound(), time.perf_counter()
    output = model.generate(
        ids,
        **given,
        pad_token_id=_pad(tokenizer),
        questions=prepared.others,
        stopping_criteria=[_Stop(tokenizer, until)] if until else None,
        logits_processor=LogitsProcessorList([sound]),
        streamer=clock if timed else None,
        **options,
    )
    if model.chat is not None:  # whose `generate` gives the prompt back, too
        output = output[:, ids.shape[1] :]
    rows = output.tolist()
    seconds = time.perf_counter() - start
    sound.check(requests)
    times = (prepared.seconds, clock.seconds - start, seconds) if timed else ()
    counts = _image_tokens(model, [len(request.images) for request in requests])
    layers = model.mean_per_layer or [None] * len(rows)
    return [
        Answer(*read_tokens(tokenizer, row, until), *count, *times, mean_per_layer=mean)
        for row, count, mean in zip(rows, counts, layers, strict=True)
    ]


def read_tokens(tokenizer: Any, row: list[int], until: Sequence[str]) -> tuple[str, int]:
    """Text of what was generated, cut at the first stop string, and its number of tokens."""
    text = tokenizer.decode(row, skip_special_tokens=True)
    return _cut(text, until), _length(tokenizer, row)


def prepare_pixels(
    model: Any, images: Sequence[Image.Image], limits: Limits = Limits()
) -> dict[str, Any]:
    """Images as arguments of `generate`, on the CPU; `model.pictures` reads them, too.

    Raises:
        TypeError, ValueError: for an image that is none or breaks a limit.
    """
    if model.chat is not None:
        return dict(model.image_processor(fit_images(images, limits), return_tensors="pt"))
    pixels, sizes = prepare_images(images, model.image_processor, model.config, limits)
    return {"images": pixels, "image_sizes": sizes}


def _pinned(value: Any) -> Any:
    """A tensor, or each of a list, in page-locked memory; anything else as it is."""
    if isinstance(value, list):
        return [_pinned(each) for each in value]
    return value.pin_memory() if isinstance(value, torch.Tensor) else value


def stop_strings(until: str | Sequence[str] | None) -> list[str]:
    """What a task says under `until`, as a list."""
    return [until] if isinstance(until, str) else list(until or ())


def prompt_ids(model: Any, tokenizer: Any, question: str) -> torch.Tensor:
    """(S,) token ids of a question about an image, in the checkpoint's conversation."""
    if model.chat is not None:
        return torch.tensor(_chat_row(model.chat, question))
    name = template_name(model.config._name_or_path, model.config)
    return torch.tensor(_prompt_row(tokenizer, question, name))


def _by_template(
    model: Any, tokenizer: Any, requests: Sequence[Request], template: str, limits: Limits
) -> dict[str, Any]:
    """Arguments of official LLaVA's `generate`."""
    images = [image for request in requests for image in request.images]
    given = prepare_pixels(model, images, limits) if images else {"images": None}
    ids, mask = _prompt_ids(tokenizer, requests, template)
    return {"inputs": ids, "attention_mask": mask, **given}


def _by_chat(model: Any, requests: Sequence[Request], limits: Limits) -> dict[str, Any]:
    """Arguments of `generate` of transformers' own classes, by the processor's chat template."""
    images = [fit_images(request.images, limits) if request.images else [] for request in requests]
    texts = [
        _chat(model.chat, request.question, len(own))
        for request, own in zip(requests, images, strict=True)
    ]
    batch = model.chat(
        text=texts,
        images=images if any(images) else None,
        padding=True,
        return_tensors="pt",
        add_special_tokens=not texts[0].startswith(model.chat.tokenizer.bos_token or "\0"),
    )
    return {"inputs": batch.pop("input_ids"), **batch}


def _chat(chat: Any, question: str, images: int) -> str:
    """One turn in the processor's chat template, the images where the question places them."""
    parts = question.split(DEFAULT_IMAGE_TOKEN)
    if len(parts) - 1 not in (0, images):
        raise ValueError(
            f"the question has {len(parts) - 1} marks {DEFAULT_IMAGE_TOKEN} for {images} images: "
            f"{question}"
        )
    content: list[dict[str, str]] = [{"type": "image"}] * (images if len(parts) == 1 else 0)
    for i, part in enumerate(parts):
        content += [{"type": "image"}] if i else []
        content += [{"type": "text", "text": part}] if part.strip() else []
    turn = {"role": "user", "content": content}
    return chat.apply_chat_template([turn], add_generation_prompt=True)


def _chat_row(chat: Any, question: str) -> list[int]:
    """Token ids of a question about one image, or as many as it places itself."""
    images = max(1, question.count(DEFAULT_IMAGE_TOKEN))
    return chat.tokenizer(_chat(chat, question, images)).input_ids


def _others(
    model: Any, tokenizer: Any, requests: Sequence[Request], template: str
) -> list[torch.Tensor] | None:
    """Prompts of the other questions, if the method wants them and all are given."""
    if model.pruner.question != "other" or not all(request.other for request in requests):
        return None
    if model.chat is not None:
        return [torch.tensor(_chat_row(model.chat, request.other)) for request in requests]
    return [torch.tensor(_prompt_row(tokenizer, r.other, template)) for r in requests]


def _prompt_row(
    tokenizer: Any, question: str, template: str, images: int | None = None
) -> list[int]:
    """Token ids of a prompt; default: one image, or as many as the question places itself."""
    images = max(1, question.count(DEFAULT_IMAGE_TOKEN)) if images is None else images
    prompt = build_prompt(template, question, images)
    return tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX)


def _prompt_ids(
    tokenizer: Any, requests: Sequence[Request], template: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts padded on the left, (B, L), and where they are."""
    rows = [_prompt_row(tokenizer, r.question, template, len(r.images)) for r in requests]
    longest = max(map(len, rows))
    ids = torch.tensor([[_pad(tokenizer)] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]).bool()
    return ids, mask


def _pad(tokenizer: Any) -> int:
    pad = tokenizer.pad_token_id
    return tokenizer.eos_token_id if pad is None else pad


def _length(tokenizer: Any, row: list[int]) -> int:
    """Tokens generated: up to the end mark, or to the padding behind a stop string."""
    # transformers 4 puts the mark of a beginning in front of what it generated.
    row = row[1:] if row and row[0] == tokenizer.bos_token_id else row
    if tokenizer.eos_token_id in row:
        return row.index(tokenizer.eos_token_id) + 1
    while row and row[-1] == _pad(tokenizer):
        row = row[:-1]
    return len(row)


def _image_tokens(model: Any, images: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(patches, newlines, total) of each request, which has so many images."""
    kept = iter(model.kept if any(images) else ())
    for count in images:
        own = [next(kept) for _ in range(count)]
        yield tuple(sum(getattr(i, n) for i in own) for n in ("patches", "newlines", "total"))


def _cut(text: str, until: Sequence[str]) -> str:
    for string in until:
        text = text.partition(string)[0]
    return text


class _FirstToken:
    """A streamer that notes when the first generated token has reached the host."""

    def __init__(self) -> None:
        self.puts, self.seconds = 0, float("nan")

    def put(self, tokens: torch.Tensor) -> None:
        """Called by `generate` with the prompt, then with every token."""
        self.puts += 1
        if self.puts == 2:
            self.seconds = time.perf_counter()

    def end(self) -> None:
        """Called by `generate` at the end."""


class _Sound:
    """A logits processor that changes nothing and notes rows whose highest logit is no number."""

    def __init__(self) -> None:
        self.broken: torch.Tensor | None = None  # (B * beams,) bool, on the device

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Called by `generate` with the logits of every step; NaN and infinity show in the max."""
        broken = ~torch.isfinite(scores.amax(-1))
        self.broken = broken if self.broken is None else self.broken | broken
        return scores

    def check(self, requests: Sequence[Request]) -> None:
        """Raise a ValueError naming the first question without numbers."""
        found = [] if self.broken is None else self.broken.tolist()
        if True in found:
            i = found.index(True) * len(requests) // len(found)
            raise ValueError(
                f"the language model gives NaN or infinity for question {i} of {len(requests)} "
                f"({requests[i].question!r:.60}): check the checkpoint's weights and the dtype"
            )


class _Stop:
    """Stop a row once one of its strings is there, in the answer: a prompt may hold them, too."""

    def __init__(self, tokenizer: Any, strings: list[str]) -> None:
        self.tokenizer, self.strings = tokenizer, strings
        self.prompt: int | None = None  # its length here: 0 where embeddings are handed over
        self.window = max(len(string.encode()) for string in strings) + 1  # a byte at least each

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if self.prompt is None:  # asked first behind the first token
            self.prompt = ids.shape[1] - 1
        answers = ids[:, self.prompt :][:, -self.window :]
        ends = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        done = [any(string in end for string in self.strings) for end in ends]
        return torch.tensor(done, device=ids.device)
