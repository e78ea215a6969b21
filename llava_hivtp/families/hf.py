"""Models of transformers: prompts come with a placeholder per image token and are cut here."""

from __future__ import annotations

import copy
import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from llava_hivtp.anyres import PackedImage
from llava_hivtp.families.base import Picture, Pruned, check_positions
from llava_hivtp.pruners import LayerPruner
from llava_hivtp.questions import unpadded_rows
from llava_hivtp.versions import before_5
from llava_hivtp.weighing import announce, one_call

# What has an entry per token of the prompt, in its last dimension.
_ALIGNED = ("attention_mask", "labels", "mm_token_type_ids", "token_type_ids", "position_ids")


class PrunedHF(Pruned):
    """Cuts prompt and image tokens at the entry of `generate` and of a direct call.

    Masks, positions and cache are then the stock class's own. `generate` gives the whole prompt
    back, then what was generated.
    """

    # Layout mosaic would need more tokens than the processor placed.
    layouts: ClassVar[tuple[str, ...]] = ("unpad", "inside")

    @staticmethod
    def check_model(model: Any) -> None:
        """Refuse transformers that cannot take image tokens made elsewhere."""
        if not takes_encoder_outputs(model):
            raise ValueError(
                f"{type(model).__name__} takes no mm_encoder_outputs: pruning it needs "
                "transformers 5.18 or newer"
            )

    @classmethod
    def processor(cls, path: str | Path) -> Any:
        """The checkpoint's processor; images are processed by PIL."""
        pil = {"use_fast": False} if before_5() else {"backend": "pil"}
        return AutoProcessor.from_pretrained(path, **pil)

    @property
    def image_mark(self) -> int:
        """One of the placeholders."""
        return self.config.image_token_id

    @property
    def image_processor(self) -> Any:
        """The processor's."""
        if self.chat is None:
            raise ValueError(
                "the model has no processor: load it with llava_hivtp.load, or set "
                "model.chat = processor"
            )
        return self.chat.image_processor

    def slots(self, image: PackedImage) -> Any:
        """Index of the placeholders that stay: which of them, matters to no plain positions."""
        return slice(len(image.tokens))

    def encoder_outputs(self, packed: list[PackedImage]) -> Any:
        """The survivors as the stock class takes its encoder's outputs."""
        return BaseModelOutputWithPooling(pooler_output=[image.tokens for image in packed])

    def place(self, given: dict[str, Any], marks: Tensor, stay: Tensor) -> None:
        """Add the whole prompt's positions to a call about to be cut, if what stays keeps them.

        `marks` are the placeholders among (B, S) tokens, `stay` which of them stay.
        """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A forward pass; not `forward`, which accelerate replaces per instance."""
        if args:
            bound = inspect.signature(type(self).stock.forward).bind(self, *args, **kwargs)
            kwargs = {k: v for k, v in bound.arguments.items() if k not in ("self", "kwargs")}
            kwargs |= bound.arguments.get("kwargs", {})
        with self.layers_dropping(), one_call():
            if kwargs.get("pixel_values") is not None:
                self.check_labels(kwargs.get("labels"))
                kwargs = self._cut(kwargs)
                if kwargs.get("inputs_embeds") is not None:  # a direct call takes one of the two
                    del kwargs["input_ids"]
            return super().__call__(**kwargs)

    @torch.no_grad()
    def generate(
        self, inputs: Tensor | None = None, generation_config: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As the stock class: the prompt as it was given, then what was generated."""
        if kwargs.get("pixel_values") is None:
            return super().generate(inputs, generation_config, *args, **kwargs)
        prompt = kwargs.pop("input_ids", None) if inputs is None else inputs
        config = generation_config or self.generation_config
        self.check_generation(kwargs, config)
        if prompt is not None and kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = _mask_of(prompt, kwargs, config)
        with self.choosing_by(kwargs.pop("questions", None)), self.layers_dropping(), one_call():
            given = self._cut(kwargs | {"input_ids": prompt})
            length = given["input_ids"].shape[1]
            generation_config = _shorter(given, generation_config, config, prompt.shape[1] - length)
            output = super().generate(None, generation_config, *args, **given)
        rows = output if isinstance(output, Tensor) else output.sequences
        new = rows[:, length:]
        whole = prompt.to(new).repeat_interleave(len(new) // len(prompt), 0)
        whole = torch.cat([whole, new], 1)
        if isinstance(output, Tensor):
            return whole
        output.sequences = whole
        return output

    def _cut(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call with its images pruned and its prompt as much shorter."""
        given = dict(kwargs)
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        if ids is None or given.get("inputs_embeds") is not None:
            raise ValueError("pixel_values need input_ids, which say where the images go")
        if mask is not None and mask.shape != ids.shape:
            raise ValueError(
                f"attention_mask of shape {tuple(mask.shape)} for input_ids of "
                f"{tuple(ids.shape)}: images can be pruned in the first call only, without a cache"
            )
        # Read before the GPU has anything to do that this would wait for.
        marks = (ids == self.image_mark).cpu()
        seen = torch.ones_like(marks) if mask is None else mask.bool().cpu()
        pictures = self.pictures(given)
        _check_places(marks, [picture.places for picture in pictures])
        if self.pruner.asks:
            pictures = self._asking(pictures, ids, seen, marks)
        packed, check = self.prune(pictures)
        given["mm_encoder_outputs"] = {"image": self.encoder_outputs(packed)}
        check_positions(self.positions, self)
        kept = self._kept_positions(given, seen, marks, packed, pictures)
        stay = self._staying(packed, pictures)
        if not stay.all():
            self.place(given, marks, stay)
            if mask is None and len(ids) > 1:
                given["attention_mask"] = torch.ones_like(ids)
            _shorten(given, *_order(seen, marks, stay), self.image_mark)
        image = given["input_ids"] == self.image_mark
        if kept is not None:
            places = given["position_ids"].to(image.device)
            given["position_ids"] = places.masked_scatter(image, kept.to(image.device))
        if isinstance(self.pruner, LayerPruner):
            self._note_splice(image, given.get("attention_mask"), packed)
        check()
        if self.pruner.weigh:
            sizes = torch.cat([part.size for part in packed]).to(image.device)
            ones = torch.ones(image.shape, device=image.device)
            announce(self.get_decoder(), ones.masked_scatter(image, sizes))
        if not takes_encoder_outputs(self):
            self._embed(given, image)
        return given

    def _embed(self, given: dict[str, Any], image: Tensor) -> None:
        """Hand the image tokens over among the prompt's embeddings, as before 5.18."""
        tokens = torch.cat(given.pop("mm_encoder_outputs")["image"].pooler_output)
        embeds = self.get_input_embeddings()(given["input_ids"])
        given["inputs_embeds"] = embeds.masked_scatter(image[..., None], tokens.to(embeds))

    def _note_splice(self, image: Tensor, mask: Tensor | None, packed: list[PackedImage]) -> None:
        patch = torch.cat([one.is_patch for one in packed]).to(image.device)
        real = torch.ones_like(image) if mask is None else mask.bool().to(image.device)
        self.note_splice(image, image.masked_scatter(image, patch), real)

    def _kept_positions(
        self,
        given: dict[str, Any],
        seen: Tensor,
        marks: Tensor,
        packed: list[PackedImage],
        pictures: list[Picture],
    ) -> Tensor | None:
        """Positions of all image tokens that stay, if `positions` is kept; the text's go along."""
        if self.positions != "kept":
            return None
        given.setdefault("position_ids", (seen.cumsum(1) - 1).clamp(min=0))
        if given.get("attention_mask") is None:  # gaps would look like several rows
            given["attention_mask"] = torch.ones_like(given["input_ids"])
        starts = given["position_ids"].to(marks.device)[marks]
        first, found = 0, []
        for image, picture in zip(packed, pictures, strict=True):
            found.append(starts[first] + image.place.to(marks.device))
            first += picture.places
        return torch.cat(found)

    def _asking(
        self, pictures: list[Picture], ids: Tensor, seen: Tensor, marks: Tensor
    ) -> list[Picture]:
        """The pictures, each with the embedded question of its row."""
        questions = self.asked(unpadded_rows(ids, seen.to(ids.device)))
        ends = marks.sum(1).cumsum(0)
        filled = torch.tensor([picture.places for picture in pictures]).cumsum(0)
        rows = torch.searchsorted(ends, filled).tolist()
        both = zip(pictures, rows, strict=True)
        return [replace(picture, question=questions[row]) for picture, row in both]

    def _staying(self, packed: list[PackedImage], pictures: list[Picture]) -> Tensor:
        """Which of the placeholders of all images stay, on the host."""
        stay = [torch.zeros(picture.places, dtype=torch.bool) for picture in pictures]
        for i, (flags, image) in enumerate(zip(stay, packed, strict=True)):
            if len(image.tokens) > len(flags):
                raise ValueError(
                    f"image {i} needs {len(image.tokens)} tokens with "
                    f"{type(self.pruner).__name__}, its placeholders are {len(flags)}: keep less"
                )
            flags[self.slots(image)] = True
        return torch.cat(stay)


def takes_encoder_outputs(model: Any) -> bool:
    """Whether a model of transformers takes image tokens made elsewhere, as from 5.18 on."""
    return "mm_encoder_outputs" in inspect.signature(type(model).forward).parameters


def check_pixels(pixels: Any) -> None:
    """Raise a TypeError unless pixel_values are a floating-point tensor."""
    if not isinstance(pixels, Tensor) or not pixels.is_floating_point():
        got = pixels.dtype if isinstance(pixels, Tensor) else type(pixels).__name__
        raise TypeError(f"pixel_values must be a floating-point tensor, got {got}")


def _check_places(marks: Tensor, places: list[int]) -> None:
    """Raise a ValueError unless the placeholders (B, S) are those of the images, row by row."""
    if int(marks.sum()) != sum(places):
        raise ValueError(
            f"{int(marks.sum())} image placeholders in the prompts, the images take "
            f"{' + '.join(map(str, places))}: the processor's patch_size, "
            "num_additional_image_tokens or vision_feature_select_strategy do not fit the model"
        )
    ends = torch.tensor(places).cumsum(0).tolist()
    rows = [end for end in marks.sum(1).cumsum(0).tolist() if end]
    if not set(rows) <= set(ends):
        raise ValueError(
            f"rows end after {rows} image placeholders, images after {ends}: no image lies in "
            "two rows; hand over the images in the order of the prompts"
        )


def _order(seen: Tensor, marks: Tensor, stay: Tensor) -> tuple[Tensor, Tensor]:
    """Order (B, S') in which the tokens that stay fill the rows again, and where they stand.

    Rows are padded where they were: on the left unless a row ends in padding.
    """
    alive = seen.masked_scatter(marks, stay & seen[marks])
    left = bool(seen[:, -1].all())
    length = int(alive.sum(1).max())
    order = (alive if left else ~alive).byte().argsort(dim=1, stable=True)
    order = order[:, -length:] if left else order[:, :length]
    return order, alive.gather(1, order)


def _shorten(given: dict[str, Any], order: Tensor, alive: Tensor, image_token: int) -> None:
    """Put what has an entry per token into the order; what is not alive becomes padding."""
    device = given["input_ids"].device
    order, alive = (flags.to(device, non_blocking=True) for flags in (order, alive))
    for name in ("input_ids", *_ALIGNED):
        if (aligned := given.get(name)) is not None:
            given[name] = aligned.gather(-1, order.expand(*aligned.shape[:-1], -1))
    # A dropped placeholder that pads a row must not count as one.
    given["input_ids"] = given["input_ids"].masked_fill(
        ~alive & (given["input_ids"] == image_token), 0
    )
    if given.get("attention_mask") is not None:
        given["attention_mask"] = given["attention_mask"] * alive
    if given.get("labels") is not None:
        given["labels"] = given["labels"].masked_fill(~alive, -100)


def _mask_of(prompt: Tensor, kwargs: dict[str, Any], config: Any) -> Tensor | None:
    """The mask that stock `generate` infers from padding, None for none."""
    pad = kwargs.get("pad_token_id", config.pad_token_id)
    end = kwargs.get("eos_token_id", config.eos_token_id)
    ends = end if isinstance(end, (list, tuple)) else [end]
    return None if pad is None or pad in ends else (prompt != pad).to(prompt.dtype)


def _shorter(given: dict[str, Any], passed: Any, config: Any, cut: int) -> Any:
    """The configuration to pass on; limits of prompt and answer together count `cut` less."""
    for name, instead in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        if given.get(instead, getattr(config, instead)) is not None:
            continue
        if given.get(name) is not None:
            given[name] -= cut
        elif getattr(config, name) not in (None, getattr(type(config)(), name)):
            passed = copy.deepcopy(config)
            setattr(passed, name, getattr(config, name) - cut)
            config = passed
    return passed
