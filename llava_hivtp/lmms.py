"""The lmms-eval model `llava_hivtp`: official tasks on a pruned LLaVA, nobody's file edited."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from tqdm import tqdm

from llava_hivtp.ahead import done_behind, made_ahead
from llava_hivtp.limits import Limits
from llava_hivtp.zero3 import Team, join

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

    from llava_hivtp.answer import Answer, Prepared, Request

logger = logging.getLogger(__name__)
_WORKERS = 2  # each prepares some 80 AnyRes images a second: eval/measured/preparation.md
_DEFAULTS = {"max_new_tokens": 1024, "num_beams": 1}
_SAMPLING = ("temperature", "top_p", "top_k")  # without effect, and warned of, in greedy decoding
_CHECKPOINTS = ("image_aspect_ratio",)  # the checkpoint says it; a task's wish is not heard


def manifest() -> ModelManifest:
    """What the entry point `lmms_eval.models` hands to lmms-eval."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("llava_hivtp", simple_class_path=f"{__name__}.{LlavaHIVTP.__name__}")


class Journal(Protocol):
    """A memory of finished requests that outlives the process."""

    def get(self, instance: Instance) -> Answer | None:
        """The answer given before, if any."""

    def add(self, finished: Sequence[tuple[Instance, Answer]]) -> None:
        """Keep the answers of a batch for good."""


class Answering(lmms):
    """Requests of lmms-eval as documents, answers that a journal remembers; no model yet."""

    is_simple = True

    def __init__(self) -> None:
        """Without a journal."""
        super().__init__()
        self.journal: Journal | None = None
        self.answers: dict[tuple[str, int], Answer] = {}  # (task, doc_id), of the last evaluation
        self.shrinks = False  # whether a batch that is too large for the memory may be halved

    def clean(self) -> None:
        """Keep the model, which lmms-eval would delete: it answers the next task too."""

    def progress(self, total: int, done: int) -> Any:
        """A bar over requests, with `update(n)`, as a context."""
        return tqdm(total=total, initial=done, desc="answering", disable=self.rank != 0)

    def ready(self, i: int, requests: Sequence[Instance]) -> Request:
        """The i-th of all requests, and the question of the one half of them further on.

        That is the other question of a method with question=other, whatever the batch.
        """
        other = requests[(i + len(requests) // 2) % len(requests)].args[0]
        return replace(self.read(requests[i]), other=other if len(requests) > 1 else "")

    def read(self, instance: Instance) -> Request:
        """Open the document behind a request; a broken image is an error that names it."""
        from llava_hivtp.answer import Request
        from llava_hivtp.images import whole_files

        question, options, doc_to_visual, doc_id, task, split = instance.args
        try:
            with whole_files():
                visuals = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{task}: document {doc_id} cannot be read: {error}") from error
        return Request(question, dict(options), tuple(v for v in visuals if v is not None))

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refuse: the tasks of the paper all generate."""
        raise NotImplementedError("llava_hivtp generates answers; it gives no loglikelihood")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refuse: the tasks of the paper have one round."""
        raise NotImplementedError("llava_hivtp answers one round; multi-round tasks need another")

    def recall(self, requests: Sequence[Instance]) -> dict[int, Answer]:
        """Answers that the journal has, by place among the requests."""
        if self.journal is None:
            return {}
        found = {i: self.journal.get(instance) for i, instance in enumerate(requests)}
        return {i: answer for i, answer in found.items() if answer is not None}

    def handed_in(
        self, requests: Sequence[Instance], answers: Mapping[int, Answer]
    ) -> list[GenerationResult]:
        """The answers to all requests, as lmms-eval takes them."""
        ordered = [answers[i] for i in range(len(requests))]
        self.answers = {
            (instance.args[4], instance.args[3]): answer
            for instance, answer in zip(requests, ordered, strict=True)
        }
        return [GenerationResult(a.text, TokenCounts(output_tokens=a.generated)) for a in ordered]


class LlavaHIVTP(Answering):
    """A LLaVA checkpoint with a pruner, answering lmms-eval's requests.

    Unlike lmms-eval's own `llava` it honours `until` (lmms-eval gives every task one), leaves the
    task's settings as they are, and lets an error fail the run instead of answering nothing.
    """

    def __init__(
        self,
        pretrained: str,
        pruner: str = "none",
        layout: str = "unpad",
        positions: str = "packed",
        dtype: str | None = None,
        device_map: str | None = None,
        attn_implementation: str = "sdpa",
        quantization: str | None = None,
        zero3: bool = False,
        conv_template: str | None = None,
        batch_size: int | str = 1,
        workers: int | str | None = None,  # threads that read and prepare ahead; 0: none
        max_side: int | str = Limits.side,  # larger or thinner images fail their question
        max_aspect: float | str = Limits.aspect,
        device: str | None = None,
        max_batch_size: int | None = None,  # of lmms-eval's automatic batch size, not offered here
        **arguments: Any,
    ) -> None:
        """Load a checkpoint; `arguments` are the pruner's, spelled as in `layers=7+8+9+10`."""
        super().__init__()
        from llava_hivtp.conversation import chat_name, template_name
        from llava_hivtp.loading import load
        from llava_hivtp.pruners import build_pruner

        self.batch_size = int(batch_size)
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.workers = _WORKERS if workers is None else int(workers)
        if self.workers < 0:
            raise ValueError(f"workers must be at least 0, got {workers}")
        self.limits = Limits.read(max_side, max_aspect)
        self.model, self.tokenizer, self.image_processor, _ = load(
            pretrained,
            build_pruner(pruner, **arguments),
            layout=layout,
            positions=positions,
            dtype=dtype,
            device_map=device_map or (None if zero3 else device or _own_gpu()),
            attn_implementation=attn_implementation,
            quantization=quantization,
            zero3=zero3,
        )
        self.team = join() if zero3 else Team()
        if self.model.chat is None:
            self.conv_template = template_name(pretrained, self.model.config, conv_template)
        elif conv_template is None:
            self.conv_template = chat_name(self.model.chat)
        else:
            raise ValueError(
                f"conv_template={conv_template!r} is official LLaVA's; {pretrained} brings its own "
                "chat template"
            )

    @property
    def device(self) -> torch.device:
        """Where the language model starts."""
        return self.model.device

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer every request; an error in one fails the run.

        A team shares the batches, unless lmms-eval has given every process requests of its own.
        """
        sharers = self.team if self.world_size == 1 else Team()
        recalled = sharers.exchange(self.recall(requests))[0]
        with self.progress(len(requests), len(recalled)) as bar:
            while not self._answered(requests, recalled, sharers, bar):
                self._halve()
        return self.handed_in(requests, recalled)

    def answer(self, requests: Sequence[Request], timed: bool = False) -> list[Answer]:
        """Answer a batch: requests of equal options, all of them with images or none."""
        from llava_hivtp.answer import answer_batch

        asked = self._asked(requests)
        return answer_batch(
            self.model, self.tokenizer, asked, self.conv_template, timed=timed, limits=self.limits
        )

    def _answered(
        self,
        requests: Sequence[Instance],
        recalled: dict[int, Answer],
        sharers: Team,
        bar: Any,
    ) -> bool:
        """Answer what is not recalled yet; whether memory was enough.

        False only if the batch may be halved: whatever was answered until then is recalled.
        """
        left = [i for i in range(len(requests)) if i not in recalled]
        own = list(self._in_step(list(self._batches(requests, left)), sharers))

        def prepare(part: tuple[list[int], bool]) -> list[tuple[list[int], Prepared]]:
            return self._prepare_all([self.ready(i, requests) for i in part[0]])

        def keep(mine: dict[int, Answer]) -> None:
            for finished in sharers.exchange(mine):
                if self.journal is not None:
                    self.journal.add([(requests[i], a) for i, a in finished.items()])
                recalled.update(finished)
                bar.update(len(finished))

        # A team's processes talk while they generate, so they exchange answers in between.
        behind = self.workers > 0 and self.team.count == 1
        try:
            with (
                made_ahead(prepare, own, self.workers) as ready,
                done_behind(keep, behind) as hand,
            ):
                for (batch, wanted), prepared in zip(own, ready, strict=True):
                    answers = self._answer_all(prepared)
                    hand(dict(zip(batch, answers, strict=True)) if wanted else {})
        except torch.OutOfMemoryError:
            if not self.shrinks or self.batch_size == 1 or self.team.count > 1:
                raise
            return False
        return True

    def _halve(self) -> None:
        """Go on with half the batch; the error's frames, which held the tensors, are gone."""
        self.batch_size //= 2
        logger.warning("out of memory: going on with batch %d", self.batch_size)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _prepare_all(self, requests: list[Request]) -> list[tuple[list[int], Prepared]]:
        """Requests of equal options, and their places: those without an image by themselves."""
        from llava_hivtp.answer import prepare_batch

        if self.team.count > 1 and len({bool(request.images) for request in requests}) > 1:
            raise ValueError("zero3 takes no batch with and without images: use batch_size=1")
        found = []
        for seeing in (True, False):
            group = [i for i, request in enumerate(requests) if bool(request.images) == seeing]
            if group:
                asked = self._asked([requests[i] for i in group])
                prepared = prepare_batch(
                    self.model, self.tokenizer, asked, self.conv_template, limits=self.limits
                )
                found.append((group, prepared))
        return found

    def _answer_all(self, prepared: list[tuple[list[int], Prepared]]) -> list[Answer]:
        """The answers, in the order of the requests."""
        from llava_hivtp.answer import answer_prepared

        answers: dict[int, Answer] = {}
        for group, batch in prepared:
            found = answer_prepared(self.model, self.tokenizer, batch)
            answers.update(zip(group, found, strict=True))
        return [answers[i] for i in range(len(answers))]

    def _asked(self, requests: Sequence[Request]) -> list[Request]:
        return [replace(each, options=generation(each.options)) for each in requests]

    def _batches(self, requests: Sequence[Instance], left: list[int]) -> Iterator[list[int]]:
        """Indices of requests that share options, longest questions first."""
        groups: dict[str, list[int]] = {}
        for i in left:
            groups.setdefault(json.dumps(requests[i].args[1], sort_keys=True), []).append(i)
        for group in groups.values():
            group.sort(key=lambda i: -len(requests[i].args[0]))
            for start in range(0, len(group), self.batch_size):
                yield group[start : start + self.batch_size]

    def _in_step(self, batches: list[list[int]], sharers: Team) -> Iterator[tuple[list[int], bool]]:
        """This process's batches and whether they are wanted: as many as the busiest has."""
        own = batches[sharers.index :: sharers.count]
        most = max(self.team.exchange(len(own)))
        if len(own) < most and not batches:
            raise ValueError("a process of the team has no request: ask about more documents")
        yield from ((batch, True) for batch in own)
        yield from ((batch, False) for batch in batches[:1] * (most - len(own)))


def generation(options: Mapping[str, Any]) -> dict[str, Any]:
    """A task's settings as `generate` takes them: greedy at temperature 0, as lmms-eval does."""
    sample = (options.get("temperature") or 0) > 0
    unheard = _CHECKPOINTS if sample else (*_CHECKPOINTS, *_SAMPLING)
    options = {name: value for name, value in options.items() if name not in unheard}
    return _DEFAULTS | options | {"do_sample": sample}


def _own_gpu() -> str | None:
    """The GPU of this process under torchrun or accelerate."""
    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if rank is not None and torch.cuda.is_available() else None
