"""What transformers itself answers, with the kept features put into the prompt by hand."""

from __future__ import annotations

import zlib
from dataclasses import replace

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    unpad_image,
)

from llava_hivtp.pruners import build_pruner
from llava_hivtp.vision import VisionFeatures, encode_tiles

STEPS = 8


class Reference:
    """Greedy answers in float32; written in plain loops, on purpose not as the plug-in is."""

    def __init__(self, folder, settings=None):
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = AutoProcessor.from_pretrained(folder)
        self.config = self.model.config
        vision = self.config.vision_config
        self.n = vision.image_size // vision.patch_size
        settings = None if settings is None else dict(settings)
        self.layout = settings and settings.pop("layout", "inside")
        self.pruner = settings and build_pruner(settings.pop("pruner", "hivtp"), **settings)

    @torch.no_grad()
    def ask(self, prompt, images, bos=True):
        """(number of prompt tokens, answer's tokens, per step {token: log-probability})."""
        if self.pruner is None:
            inputs = self.processor(text=prompt, images=images or None, return_tensors="pt")
            return self._generate(inputs["input_ids"].shape[1], **inputs)
        ids = torch.tensor(self.processor.tokenizer.encode(prompt, add_special_tokens=bos))
        text, parts, at = self.model.get_input_embeddings()(ids), [], 0
        marks = (ids == self.config.image_token_index).nonzero().flatten().tolist()
        for mark, image in zip(marks, images, strict=True):
            parts += [text[at:mark], self.tokens(image)]
            at = mark + 1
        embeds = torch.cat([*parts, text[at:]])[None]
        return self._generate(embeds.shape[1], inputs_embeds=embeds)

    def _generate(self, length, **inputs):
        out = self.model.generate(
            **inputs,
            max_new_tokens=STEPS,
            min_new_tokens=None,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens = out.sequences[0, -STEPS:].tolist()
        steps = [logits[0].log_softmax(-1) for logits in out.logits]
        return length, tokens, steps

    def tokens(self, image):
        """(L, D_lm) of one image: its kept tokens in reading order."""
        pixels = self.processor.image_processor(image, return_tensors="pt")["pixel_values"]
        inner, depth = self.model.model, self.config.vision_config.num_hidden_layers - 1
        pixels = pixels[0] if pixels.ndim == 5 else pixels
        hidden, tap = encode_tiles(inner.vision_tower, pixels, depth, self.pruner.layers)
        projector = inner.multi_modal_projector
        features = VisionFeatures(
            hidden[:, 1:],
            hidden[:, 0],
            tap.queries,
            tap.keys,
            projector,
            half_project=lambda tokens: projector.act(projector.linear_1(tokens)),
        )
        key = zlib.crc32(pixels.contiguous().numpy())
        if not hasattr(self.config, "image_grid_pinpoints"):
            kept = self.pruner.select(replace(features, key=key))
            return inner.multi_modal_projector(kept.tokens)
        rows, columns = get_anyres_image_grid_shape(
            image.size[::-1], self.config.image_grid_pinpoints, self.config.vision_config.image_size
        )
        features = replace(features, key=key, tile_grid=(columns, rows))
        return self._packed(features, rows, columns, image.size)

    def _packed(self, features, rows, columns, size):
        n, project = self.n, self.model.model.multi_modal_projector
        names = torch.arange(rows * columns * n * n).view(1, rows * n, columns * n)
        if self.layout == "inside":
            names = unpad_image(names, size[::-1])
        seen = set(names.flatten().tolist())

        def name(tile, patch):
            row, column = divmod(tile - 1, columns)
            return (row * n + patch // n) * columns * n + column * n + patch % n

        if self.layout == "inside":
            shown = torch.tensor(
                [
                    [tile == 0 or name(tile, p) in seen for p in range(n * n)]
                    for tile in range(1 + rows * columns)
                ]
            )
            kept = self.pruner.select_inside(features, shown)
        else:
            kept = self.pruner.select(features)
        where = list(zip(kept.tile.tolist(), kept.patch.tolist(), strict=True))
        base = [i for i, (tile, _) in enumerate(where) if tile == 0]
        loose = [i for i, (tile, patch) in enumerate(where) if tile and patch < 0]
        at = {name(*place): i for i, place in enumerate(where) if place[0] and place[1] >= 0}
        projected, out = project(kept.tokens), []
        out += [projected[i] for i in base]
        for line in names[0].tolist():
            out += [projected[at[place]] for place in line if place in at]
            if self.layout == "inside":
                out.append(self.model.model.image_newline)
        return torch.stack(out + [projected[i] for i in loose])
