"""Requests of lmms-eval answered by vLLM: prompts and counts as in process, many at a time."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import PIL
import torch
from PIL import Image
from transformers import GenerationConfig

from eval.run.engine import Engine, EngineError, Server
from llava_hivtp.ahead import made_ahead
from llava_hivtp.answer import Answer, Request, prepare_batch, read_tokens, stop_strings
from llava_hivtp.conversation import chat_name
from llava_hivtp.families.base import Picture
from llava_hivtp.images import fit_images
from llava_hivtp.limits import Limits
from llava_hivtp.lmms import Answering, generation
from llava_hivtp.loading import outline
from llava_hivtp.serving.settings import room_for
from llava_hivtp.zero3 import Team

CHECKED = 16  # images a unit whose pixels are compared with the engine's
# Sources of an answer that are not imported here: the plug-in, and who counts an image's tokens.
PARTS = ("llava_hivtp.serving.models", "llava_hivtp.families.hf_llava_next")


class Served(Answering):
    """A checkpoint of transformers' format behind vLLM, answering lmms-eval's requests.

    `model` has no weights: it holds the method, and prepares prompts and pixels as in process. The
    token ids go to the engine as they are; its own pixels are compared with ours.
    """

    def __init__(
        self,
        pretrained: str,
        engine: Engine,
        layout: str = "unpad",
        dtype: str | None = None,
        max_side: int | str = Limits.side,
        max_aspect: float | str = Limits.aspect,
    ) -> None:
        """Start nothing yet."""
        super().__init__()
        self.pretrained, self.engine = pretrained, engine
        self.batch_size = 1  # requests that are with the engine at a time
        self.limits, self.team = Limits.read(max_side, max_aspect), Team()
        self.model, self.image_processor = outline(pretrained, dtype, layout)
        self.tokenizer = self.image_processor.tokenizer
        self.conv_template = chat_name(self.image_processor)
        config = GenerationConfig.from_pretrained(pretrained)
        self.suppressed = config.suppress_tokens or ()
        self.hivtp: dict[str, Any] | None = None  # what the engine is told of the method
        self._server: Server | None = None
        self._serves: dict[str, Any] | None = None

    @property
    def device(self) -> torch.device:
        """Where the engine computes."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def close(self) -> None:
        """End the engine."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def generate_until(self, requests: list[Any]) -> list[Any]:
        """Answer every request; an error in one fails the run."""
        found = self.recall(requests)
        left = [i for i in range(len(requests)) if i not in found]
        checked = set(left[:: max(1, len(left) // CHECKED)])
        server = self._start() if left else None

        def ask(i: int) -> Answer:
            return self._ask(server, self.ready(i, requests), i in checked)

        with (
            self.progress(len(requests), len(found)) as bar,
            made_ahead(ask, left, self.batch_size) as answers,
        ):
            for i, answer in zip(left, answers, strict=True):
                if self.journal is not None:
                    self.journal.add([(requests[i], answer)])
                found[i] = answer
                bar.update(1)
        return self.handed_in(requests, found)

    def _start(self) -> Server:
        """The server of the present method, started unless it runs."""
        if self._server is not None and (self._server.ended or self._serves != self.hivtp):
            self.close()
        if self._server is None:
            dtype = str(self.model.dtype).removeprefix("torch.")
            arguments = ["--dtype", dtype, "--enable-scale-out"]
            arguments += ["--mm-processor-kwargs", json.dumps({"backend": "pil"})]
            if self.hivtp is not None:
                arguments += ["--hf-overrides", json.dumps({"hivtp": self.hivtp})]
            self._server = Server(self.engine, self.pretrained, arguments)
            self._serves = self.hivtp
        return self._server

    def _ask(self, server: Server, request: Request, checked: bool) -> Answer:
        prompt = self._prompt(request)
        images = fit_images(request.images, self.limits) if request.images else ()
        images = [_url(image) for image in images]
        if checked and images:
            self._check_pixels(server, prompt, images)
        options = generation(request.options)
        until = stop_strings(options.pop("until", None))
        reply = server.post(
            "/inference/v1/generate",
            {
                "token_ids": prompt.ids,
                "content_parts": [{"type": "image_url", "url": url} for url in images] or None,
                "sampling_params": self._sampling(options, until),
                "return_token_ids": True,
            },
        )
        (choice,) = reply["choices"]
        taken = reply["prompt_token_ids"].count(self.model.config.image_token_id)
        if taken != prompt.room:
            raise EngineError(
                f"vLLM takes {taken} tokens for the images of {request.question!r:.60}, but "
                f"{type(self.model.pruner).__name__} leaves {prompt.room}: is the plug-in in "
                f"{self.engine.environment} of another version?"
            )
        text, generated = read_tokens(self.tokenizer, choice["token_ids"], until)
        return Answer(text, generated, taken - prompt.newlines, prompt.newlines, prompt.total)

    def _prompt(self, request: Request) -> _Prompt:
        """The prompt as in process, with one placeholder an image instead of one a token."""
        batch = prepare_batch(self.model, self.tokenizer, [request], "", limits=self.limits)
        given = dict(batch.given)
        (ids,) = given.pop("inputs").tolist()
        if not request.images:
            return _Prompt(ids, [], 0, 0, 0)
        pictures = self.model.pictures(given)
        mark, short, rest = self.model.config.image_token_id, [], iter(ids)
        places = iter(picture.places for picture in pictures)
        for token in rest:
            short.append(token)
            if token == mark:
                for _ in range(next(places) - 1):
                    next(rest)
        vision = self.model.config.vision_config
        n = vision.image_size // vision.patch_size
        total = sum(n * n + picture.frame[0] * picture.frame[1] for picture in pictures)
        newlines = sum(picture.places for picture in pictures) - total
        room = sum(
            room_for(self.model.pruner, n, p.tile_grid, p.frame if any(p.tile_grid) else None)
            for p in pictures
        )
        return _Prompt(short, pictures, room + newlines, newlines, total)

    def _sampling(self, options: dict[str, Any], until: list[str]) -> dict[str, Any]:
        """Greedy decoding as `generate` does it; anything else is refused."""
        new = options.pop("max_new_tokens")
        if options != {"num_beams": 1, "do_sample": False}:
            raise ValueError(f"vLLM decodes greedily here, the task asks for {options}")
        bias = {str(token): -100 for token in self.suppressed}
        given = {"temperature": 0, "max_tokens": new, "stop": until}
        return given | ({"logit_bias": bias} if bias else {})

    def _check_pixels(self, server: Server, prompt: _Prompt, images: Sequence[str]) -> None:
        """Raise a ValueError unless the engine makes the same pixels of these images."""
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in images]
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}]
        reply = server.post("/v1/chat/completions/render", {"messages": messages})
        theirs = reply["features"]["kwargs_data"]["image"]
        for picture, encoded in zip(prompt.pictures, theirs, strict=True):
            ours = picture.pixels.to(self.model.dtype).contiguous().view(torch.uint8)
            if ours.numpy().tobytes() not in base64.b64decode(encoded):  # MessagePack, bytes as is
                raise ValueError(
                    f"vLLM makes other pixels of an image than this environment, whose Pillow is "
                    f"{PIL.__version__}: install the same in {self.engine.environment}"
                )


@dataclass(frozen=True)
class _Prompt:
    ids: list[int]
    pictures: list[Picture]
    room: int  # tokens that the images take in the engine, row breaks included
    newlines: int
    total: int  # patch tokens had nothing been pruned


def _url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
