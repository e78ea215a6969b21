"""CLIP's text tower beside the vision tower that LLaVA took from it."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad


class ClipText:
    """The parts of a CLIP that LLaVA left out, in float32."""

    def __init__(self, path: str) -> None:
        """Read them from a folder or a hub id, such as openai/clip-vit-large-patch14-336."""
        from transformers import CLIPModel, CLIPTokenizerFast

        whole = CLIPModel.from_pretrained(path).float().eval().requires_grad_(False)
        self.tokenizer = CLIPTokenizerFast.from_pretrained(path)
        self.words = whole.text_model
        self.word_projection = whole.text_projection
        self.norm = whole.vision_model.post_layernorm
        self.projection = whole.visual_projection

    @torch.no_grad()
    def patches(self, tokens: Tensor) -> Tensor:
        """(..., D) tokens of the vision tower, as CLIP compares images: (..., P)."""
        if tokens.shape[-1] != self.projection.in_features:
            raise ValueError(
                f"the vision tower gives {tokens.shape[-1]} numbers a patch, this CLIP takes "
                f"{self.projection.in_features}: name the CLIP that the tower is of"
            )
        normed = self.norm.to(tokens.device)(tokens.float())
        return self.projection.to(tokens.device)(normed)

    @torch.no_grad()
    def text(self, text: str, device: torch.device) -> Tensor:
        """(M, P): one row for every part of the text that fits the tower, the last one padded."""
        room = self.words.config.max_position_embeddings
        given = self.tokenizer(text, return_tensors="pt")
        short = -given["input_ids"].shape[1] % room
        ids, mask = (
            pad(given[name], (0, short)).reshape(-1, room).to(device)
            for name in ("input_ids", "attention_mask")
        )
        pooled = self.words.to(device)(input_ids=ids, attention_mask=mask).pooler_output
        return self.word_projection.to(device)(pooled)


@cache
def clip_text(path: str) -> ClipText:
    """A CLIP's text tower, read once.

    Raises:
        ValueError: if there is none.
    """
    try:
        return ClipText(path)
    except OSError as error:
        raise ValueError(
            f"clip={path!r} is no folder or hub id of a whole CLIP: {error}"
        ) from error
