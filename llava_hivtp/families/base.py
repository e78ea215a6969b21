"""What all families of models share: choose the tokens of every image, project them, pack them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn

from llava_hivtp.anyres import LAYOUTS, PLACES, PackedImage, inside
from llava_hivtp.dropping import check_decoder, check_generation, dropping
from llava_hivtp.merging import merge_dropped
from llava_hivtp.pruners import LayerPruner, Pruner, build_pruner, for_depth
from llava_hivtp.pruners.base import check_budget
from llava_hivtp.questions import Question, question_of
from llava_hivtp.versions import before_5
from llava_hivtp.vision import KeptTokens, VisionFeatures, pixel_digest
from llava_hivtp.weighing import check_weighing, one_call


@dataclass(frozen=True)
class Picture:
    """One image as a family hands it to its vision tower."""

    pixels: Tensor  # (T, 3, H, W) tiles, or whatever the tower reads
    n_tiles: int  # T
    tile_grid: tuple[int, int] = (0, 0)  # (columns, rows) of tiles 1..; (0, 0) if there are none
    frame: tuple[int, int] = (0, 0)  # (rows, columns) of sub-image patches that the layout shows
    newline: bool = False  # row breaks are put in
    places: int = 0  # placeholders in the prompt, where the model has them
    key: int | None = None  # digest of the pixels, where they are cast already
    question: Question | None = None  # for a method that asks


@dataclass(frozen=True)
class Tower:
    """What a method must fit."""

    layers: int  # encoder layers
    patches: int | None  # of a tile; None: every image has a grid of its own
    cls: bool = True  # has a CLS token
    everywhere: tuple[int, ...] = ()  # layers that attend to the whole image; () for all
    read: int = 0  # layers that are run before tokens are projected; 0 for all


# A group of pictures and the features of all their tiles, one behind another.
Encoded = Iterable[tuple[VisionFeatures, list[Picture]]]


class Pruned(nn.Module):
    """Mixin in front of a stock class: its image tokens pass through `pruner`.

    `pruner`, `layout` and `positions` may be changed at any time. A family gives `check_model`,
    `tower_of`, `pictures`, `encode`, `project`, `pack`, and calls `prune` where its stock class
    reads the images; `image_mark`, `image_processor` and `aspect` say how it is asked and shown.

    Several threads may use one model: `generate` lets them in one after another, and `kept` is
    each thread's own. Hold `lock` for what belongs together: `with model.lock: model.pruner = ...;
    model.generate(...)`.
    """

    stock: ClassVar[type]  # the class that `detach` gives back
    classes: ClassVar[dict[type, type[Pruned]]] = {}  # stock class -> the one that prunes it
    layouts: ClassVar[tuple[str, ...]] = LAYOUTS
    layout = "unpad"
    chat: Any = None  # the processor, where prompts are made by its chat template; `load` sets it
    positions = "packed"
    decode: Any = None  # token ids to text, for methods that read it; `load` sets it
    _pruner = Pruner()

    def __init_subclass__(cls, **options: Any) -> None:
        """Remember the class that prunes a stock class."""
        super().__init_subclass__(**options)
        if "stock" in vars(cls):
            Pruned.classes.setdefault(cls.stock, cls)

    @staticmethod
    def check_model(model: Any) -> None:
        """Raise a ValueError unless this model of the family can be pruned."""
        raise NotImplementedError

    @staticmethod
    def tower_of(model: Any) -> Tower:
        """What a method must fit."""
        raise NotImplementedError

    @property
    def image_mark(self) -> int:
        """The token id that stands for an image in a prompt."""
        raise NotImplementedError

    @property
    def image_processor(self) -> Any:
        """What makes the pixels of images."""
        raise NotImplementedError

    @property
    def aspect(self) -> str | None:
        """How an image that is no square is shown: "pad", "anyres", or else cropped to one."""
        raise NotImplementedError

    def pictures(self, given: dict[str, Any]) -> list[Picture]:
        """The images of a call; takes what only the tower needs out of its arguments."""
        raise NotImplementedError

    def encode(self, pictures: list[Picture], layers: tuple[int, ...]) -> Encoded:
        """Run the tower, tapping `layers`; what is not the tower's is filled in later."""
        raise NotImplementedError

    def project(self, tokens: Tensor) -> Tensor:
        """(..., D) to (..., D_lm)."""
        raise NotImplementedError

    def half_project(self, tokens: Tensor) -> Tensor:
        """(..., D) to (..., D_h): `project` up to its last linear layer."""
        raise NotImplementedError

    def pack(self, tokens: Tensor, kept: KeptTokens, picture: Picture) -> PackedImage:
        """Projected survivors (P, D_lm) in the stock class's reading order."""
        raise NotImplementedError

    @property
    def pruner(self) -> Pruner:
        """The method in use; assigning one checks that it fits the model."""
        return self._pruner

    @pruner.setter
    def pruner(self, pruner: Pruner | str) -> None:
        self._pruner = fitting(pruner, self.tower_of(self), self)

    @property
    def kept(self) -> Sequence[PackedImage]:
        """The images of this thread's last call: what was chosen, how many tokens it makes."""
        return getattr(self._of_thread, "kept", ())

    @kept.setter
    def kept(self, images: Sequence[PackedImage]) -> None:
        self._of_thread.kept = images

    @property
    def mean_per_layer(self) -> list[float] | None:
        """Patches that a layer of the language model read, and cached, in this thread's last call.

        The mean over all layers, row by row. None where each read all of `kept`.
        """
        return getattr(self._of_thread, "mean_per_layer", None)

    @property
    def lock(self) -> threading.RLock:
        """The model's own lock; `generate` holds it, too."""
        return vars(self).setdefault("_lock", threading.RLock())

    @property
    def _of_thread(self) -> threading.local:
        return vars(self).setdefault("_local", threading.local())

    def __getstate__(self) -> dict[str, Any]:
        """A copy and a pickle begin without the lock and the last calls."""
        return {name: own for name, own in vars(self).items() if name not in ("_lock", "_local")}

    def generate(self, *args: Any, questions: Sequence[Tensor] | None = None, **kwargs: Any) -> Any:
        """As the stock class, one call at a time: caches and such are the model's.

        Args:
            args: the stock class's.
            questions: a prompt's token ids for every row, for a method that asks: it then chooses
                by the question of this prompt instead of the row's own, which the model answers
                all the same. A control: what a method gains by a question of another image is
                not owed to the question.
            kwargs: the stock class's.
        """
        with self.lock, self.choosing_by(questions), self.layers_dropping(), one_call():
            return super().generate(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A forward pass; not `forward`, which accelerate replaces per instance.

        Behind a method inside the language model it returns the logits of what is left.
        """
        with self.layers_dropping(), one_call():
            return super().__call__(*args, **kwargs)

    @contextmanager
    def layers_dropping(self) -> Iterator[None]:
        """Let a method inside the language model work in this call; calls within it are part of it.

        The family says meanwhile where it spliced the images in, by `note_splice`.
        """
        method, own = self._pruner, self._of_thread
        if getattr(own, "dropping", False):
            yield
            return
        own.mean_per_layer = None
        if not isinstance(method, LayerPruner):
            yield
            return
        decoder = self.get_decoder()
        check_decoder(decoder, method)  # again: its fields may have been changed since
        own.dropping, own.splice = True, None
        try:
            with self.lock, dropping(decoder, method, self._look) as run:
                yield
            if own.splice is not None:
                _, patch, _ = own.splice
                own.mean_per_layer = run.mean(patch)
        finally:
            own.dropping, own.splice = False, None

    def check_generation(self, given: dict[str, Any], config: Any) -> None:
        """Raise a ValueError if `generate` cannot work so under this method; see `dropping`."""
        if isinstance(self._pruner, LayerPruner):
            check_generation(self._pruner, given, config or self.generation_config)

    def check_labels(self, labels: Any) -> None:
        """Raise a ValueError if there are labels for positions that will be dropped."""
        if labels is not None and isinstance(self._pruner, LayerPruner):
            raise ValueError(
                f"{type(self._pruner).__name__} drops positions inside the language model, so that "
                "labels have no logits to be compared with: train under a method before it"
            )

    def note_splice(self, image: Tensor, patch: Tensor, real: Tensor) -> None:
        """Say where the tokens of `kept` went: (B, S) bool each.

        Args:
            image: tokens of an image, its row breaks included.
            patch: the same without row breaks.
            real: no padding.
        """
        self._of_thread.splice = image, patch, real

    def _look(self, rows: int) -> tuple[Tensor, Tensor] | None:
        """`Dropping`'s: the splice, for as many rows as `generate` made of the prompts."""
        if self._of_thread.splice is None:
            return None
        image, _, real = self._of_thread.splice
        copies = rows // len(image)
        return image.repeat_interleave(copies, 0), real.repeat_interleave(copies, 0)

    @contextmanager
    def choosing_by(self, questions: Sequence[Tensor] | None) -> Iterator[None]:
        """Let a method that asks choose by these prompts, as `generate` says; None: the rows'."""
        before = getattr(self._of_thread, "questions", None)
        self._of_thread.questions = before if questions is None else questions
        try:
            yield
        finally:
            self._of_thread.questions = before

    def asked(self, rows: list[Tensor]) -> list[Question]:
        """The question of every row, given the rows' unpadded token ids."""
        given = getattr(self._of_thread, "questions", None)
        if given is None and self._pruner.question == "other":
            raise ValueError(
                "question=other needs questions=, a prompt about another image for every row"
            )
        if given is not None and len(given) != len(rows):
            raise ValueError(f"{len(given)} questions for {len(rows)} rows")
        return self.embedded(given or rows)

    def embedded(self, rows: Sequence[Tensor]) -> list[Question]:
        """The question of every unpadded prompt."""
        table = self.get_input_embeddings()
        ids = [question_of(torch.as_tensor(row), self.image_mark) for row in rows]
        with torch.no_grad():
            found = [table(question.to(table.weight.device)) for question in ids]
        return [Question(one, self._text(own)) for one, own in zip(found, ids, strict=True)]

    def _text(self, question: Tensor) -> str:
        """(Q,) token ids as text, where the method reads it."""
        if not self._pruner.reads:
            return ""
        if self.decode is None:
            raise ValueError(
                f"{type(self._pruner).__name__} reads the question as text: load the model with "
                "llava_hivtp.load, or set model.decode = tokenizer.decode"
            )
        return self.decode(question.tolist())

    def prune(self, pictures: list[Picture]) -> tuple[list[PackedImage], Callable[[], None]]:
        """Choose, project and pack the tokens of every image, and fill `kept`.

        And a call that raises a ValueError naming the image if the tower did not give numbers.

        Raises:
            ValueError: if the method keeps more of an image than its budget.
            TypeError: if it returns anything but row-aligned `KeptTokens`.
        """
        chosen, checks = self._choose(pictures)
        projected = self.project(torch.cat([kept.tokens for kept in chosen]))
        projected = projected.split([len(kept) for kept in chosen])
        packed = [self.pack(*image) for image in zip(projected, chosen, pictures, strict=True)]
        # Without the graph, which could not be copied and would outlive the training step.
        self.kept = [replace(image, tokens=image.tokens.detach()) for image in packed]

        def check() -> None:
            for one in checks:
                one()

        return packed, check

    def with_projector(self, features: VisionFeatures) -> VisionFeatures:
        """What the tower saw, with the projector for methods that compare by it."""
        return replace(features, project=self.project, half_project=self.half_project)

    def _choose(self, pictures: list[Picture]) -> tuple[list[KeptTokens], list[Callable[[], None]]]:
        pruner, chosen, checks = self._pruner, [], []
        check_fit(pruner, self.tower_of(self))  # again: its fields may have been changed since
        if pruner.weigh:
            check_weighing(self.get_decoder(), type(pruner).__name__)
        for every, group in self.encode(pictures, pruner.layers):
            every = self.with_projector(every)
            counts = [picture.n_tiles for picture in group]
            checks.append(_start_check(every, counts, len(chosen)))
            try:
                with torch.autocast(every.tokens.device.type, enabled=False):
                    # A trainer in bfloat16 would have scores in bfloat16, too.
                    each = select_each(pruner, every, group, self.layout == "inside")
                check_budget(pruner, each, counts, every.n_patches, len(chosen), every.grid)
                chosen += each
            except Exception:
                checks[-1]()  # NaN may have made the method fail: then name the image
                raise
        return chosen, checks


def fitting(pruner: Pruner | str, tower: Tower, model: Any) -> Pruner:
    """The method, built if it is a name, after checking that it fits tower and model.

    Where only some layers attend to the whole image, those of a paper move to these by themselves:
    scores of patches in different windows do not compare.
    """
    pruner = build_pruner(pruner) if isinstance(pruner, str) else pruner
    check_pruner(pruner)
    if tower.everywhere:
        pruner = for_depth(pruner, tower.layers, tower.everywhere)
    if isinstance(pruner, LayerPruner):
        check_decoder(model.get_decoder(), pruner)
    if pruner.weigh:
        check_weighing(model.get_decoder(), type(pruner).__name__)
    check_fit(pruner, tower)
    return pruner


def check_fit(pruner: Pruner, tower: Tower) -> None:
    """Raise a ValueError unless the method fits the tower."""
    if pruner.needs_cls and not tower.cls:
        raise ValueError(
            f"{type(pruner).__name__} reads the CLS token, this vision tower has none: choose "
            "another method, such as hivtp"
        )
    if pruner.needs_square and tower.patches is None:
        raise ValueError(
            f"{type(pruner).__name__} needs a square grid of patches, here every image has a grid "
            "of its own: choose another method, such as hivtp"
        )
    pruner.check(tower.layers, tower.patches)
    windowed = sorted(set(pruner.layers) - set(tower.everywhere or pruner.layers))
    if windowed:
        raise ValueError(
            f"{type(pruner).__name__}: layers {windowed} attend within windows only, whose scores "
            f"do not compare; choose from {list(tower.everywhere)}"
        )


def check_pruner(pruner: Any) -> None:
    """Raise a TypeError unless it is a method."""
    if not isinstance(pruner, Pruner):
        raise TypeError(f"a Pruner or its name is needed, got {pruner!r}; 'none' keeps everything")


def check_positions(positions: str, model: Any = None) -> None:
    """Raise a ValueError unless tokens can have these places, in this model if given."""
    if positions not in PLACES:
        raise ValueError(f"positions must be one of {PLACES}, got {positions!r}")
    if positions == "packed":
        return
    if before_5():
        raise ValueError(
            f"positions='kept' needs transformers 5, which goes on from the last position; this is "
            f"{transformers.__version__}"
        )
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if "flash" in str(attention):
        raise ValueError(
            f"positions='kept' with {attention}: it takes a row with gaps for several rows; "
            "use attn_implementation='sdpa'"
        )


def check_layout(layout: str, layouts: tuple[str, ...] = LAYOUTS) -> None:
    """Raise a ValueError unless the layout is known."""
    if not isinstance(layout, str) or layout not in layouts:
        raise ValueError(f"layout must be one of {layouts}, got {layout!r}")


def select_each(
    pruner: Pruner, every: VisionFeatures, group: list[Picture], by_frame: bool
) -> list[KeptTokens]:
    """What the method keeps of each picture of a group; `by_frame`, of what its frame shows.

    What it drops is merged where it says so, but for the letterbox of tiles.
    """
    counts = [picture.n_tiles for picture in group]
    by_frame = by_frame and any(any(picture.tile_grid) for picture in group)
    if pruner.by_tile and not by_frame:
        chosen = _aligned(pruner, pruner.select(every), every).split(counts)
    else:
        chosen = _one_by_one(pruner, every, group, by_frame)
    if not pruner.merge and (pruner.merges or not pruner.weigh):
        return chosen
    parts = zip(chosen, every.split(counts), group, strict=True)
    return [merge_dropped(k, part, pruner.merge, _shown(part, own)) for k, part, own in parts]


def _one_by_one(
    pruner: Pruner, every: VisionFeatures, group: list[Picture], by_frame: bool
) -> list[KeptTokens]:
    counts = [picture.n_tiles for picture in group]
    chosen = []
    for part, picture in zip(every.split(counts), group, strict=True):
        key = picture.key
        if key is None:
            key = pixel_digest(picture.pixels) if pruner.seeded else 0
        part = replace(part, key=key, tile_grid=picture.tile_grid)
        if picture.question is not None:
            asked = picture.question
            part = replace(part, question=asked.embedded, text=asked.text)
        if by_frame and any(picture.tile_grid):
            shown = inside(part.n, picture.tile_grid, picture.frame)
            kept = pruner.select_inside(part, shown)
        else:
            kept = pruner.select(part)
        chosen.append(_aligned(pruner, kept, part))
    return chosen


def _shown(features: VisionFeatures, picture: Picture) -> Tensor | None:
    """Which patches of tiles show the image and not its letterbox, (T, N) bool; None: all."""
    if not any(picture.tile_grid):
        return None
    return inside(features.n, picture.tile_grid, picture.frame)


def _aligned(pruner: Pruner, kept: KeptTokens, features: VisionFeatures) -> KeptTokens:
    """The survivors, if they are (P, D) tokens with a tile and a patch each."""
    name = type(pruner).__name__
    if not isinstance(kept, KeptTokens):
        raise TypeError(f"{name}.select must return KeptTokens, got {type(kept).__name__}")
    tokens, places = kept.tokens, (kept.tile, kept.patch)
    width = features.tokens.shape[-1]
    if (
        tokens.ndim != 2
        or tokens.shape[1] != width
        or any(place.shape != tokens.shape[:1] for place in places)
        or any(place.is_floating_point() or place.dtype == torch.bool for place in places)
    ):
        shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in (tokens, *places))
        raise TypeError(
            f"{name}.select must return tokens (P, {width}) and whole numbers tile (P,) and "
            f"patch (P,), got {shapes}"
        )
    return kept


def _start_check(features: VisionFeatures, tiles: list[int], first: int) -> Callable[[], None]:
    """A call that raises a ValueError naming the image unless the tower gave numbers for all.

    From a GPU the answer is under way to the host when this returns; the call waits only if it
    has not arrived.
    """
    sound, arrived = torch.isfinite(features.tokens).flatten(1).all(1), None
    if features.cls is not None:
        sound = sound & torch.isfinite(features.cls).all(1)
    if sound.is_cuda:
        stream = torch.cuda.current_stream(sound.device)
        sound = sound.to("cpu", non_blocking=True)
        arrived = stream.record_event()

    def check() -> None:
        if arrived is not None:
            arrived.synchronize()
        if False in (each := sound.tolist()):
            image_of = [i for i, count in enumerate(tiles, first) for _ in range(count)]
            raise ValueError(
                f"image {image_of[each.index(False)]} gives NaN or infinity in the vision tower; "
                "check its pixels, and the checkpoint's dtype"
            )

    return check
