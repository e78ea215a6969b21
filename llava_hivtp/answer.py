"""One question about one image, answered and timed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import tokenizer_image_token
from PIL import Image

from llava_hivtp.anyres import PackedImage
from llava_hivtp.conversation import build_prompt, template_name
from llava_hivtp.images import open_image, prepare_images


@dataclass(frozen=True)
class Answer:
    """What the model said, how long it took, and what it saw of the image."""

    text: str
    ttft: float  # seconds from the decoded image to the first token on the host
    seconds: float  # for the whole answer
    generated: int  # tokens
    image: PackedImage


class FirstToken:
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


def answer(
    model: Any,
    tokenizer: Any,
    image: Image.Image | str | Path | IO[bytes],
    question: str,
    *,
    template: str | None = None,
    max_new_tokens: int = 64,
) -> Answer:
    """Answer greedily under `model.pruner`, in the conversation the checkpoint was trained on.

    Args:
        model: a LLaVA with a pruner attached, as `load` gives it.
        tokenizer: as `load` gives it.
        image: a file, or an image already open.
        question: without the image mark; it is put in front.
        template: one of LLaVA's conversation templates; default by the checkpoint's name.
        max_new_tokens: the longest answer.
    """
    image = image if isinstance(image, Image.Image) else open_image(image)
    name = template_name(model.config._name_or_path, model.config, template)
    prompt = build_prompt(name, question, images=1)
    ids = tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
    processor, first = model.get_vision_tower().image_processor, FirstToken()
    start = time.perf_counter()
    pixels, sizes = prepare_images([image], processor, model.config)
    output = model.generate(
        ids[None].to(model.device),
        images=pixels,
        image_sizes=sizes,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        streamer=first,
    )
    seconds = time.perf_counter() - start
    text = tokenizer.decode(output[0], skip_special_tokens=True).strip()
    # transformers 4 puts the mark of a beginning in front of what it generated.
    generated = output.shape[1] - int(output[0, 0] == tokenizer.bos_token_id)
    return Answer(text, first.seconds - start, seconds, generated, model.kept[0])
