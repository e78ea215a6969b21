"""Put images and prompts to a model, the same way in every test."""

from __future__ import annotations

import torch
from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import tokenizer_image_token

from llava_hivtp.images import prepare_images
from llava_hivtp.limits import Limits
from llava_hivtp.pruners import PRUNERS, build_pruner, for_depth

ANY = Limits(aspect=2000)  # thin images, too, are to equal stock LLaVA

METHODS = {  # for a tower of four layers
    name: for_depth(
        build_pruner(name, **({"keep": 0.5} if "keep" in cls.__dataclass_fields__ else {})), 4
    )
    for name, cls in PRUNERS.items()
}


def prompt_ids(tokenizer, *texts):
    """Right-padded prompt ids and their mask, (B, S)."""
    rows = [tokenizer_image_token(text, tokenizer, IMAGE_TOKEN_INDEX) for text in texts]
    length = max(map(len, rows))
    pad = [[tokenizer.pad_token_id] * (length - len(row)) for row in rows]
    ids = torch.tensor([row + tail for row, tail in zip(rows, pad, strict=True)])
    mask = torch.tensor([[1] * len(r) + [0] * len(t) for r, t in zip(rows, pad, strict=True)])
    return ids, mask.bool()


def embed(model, tokenizer, processor, images, *texts):
    """What the language model reads: (inputs_embeds, attention_mask)."""
    ids, mask = prompt_ids(tokenizer, *texts)
    pixels, sizes = prepare_images(images, processor, model.config, ANY)
    _, _, mask, _, embeds, _ = model.prepare_inputs_labels_for_multimodal(
        ids, None, mask, None, None, pixels, sizes
    )
    return embeds, mask


def generate(model, tokenizer, processor, images, *texts, **kwargs):
    """Generated ids as lists, without what transformers puts around them."""
    ids, mask = prompt_ids(tokenizer, *texts)
    pixels, sizes = prepare_images(images, processor, model.config, ANY) if images else (None, None)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0} | kwargs
    out = model.generate(ids, images=pixels, image_sizes=sizes, attention_mask=mask, **settings)
    special = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    return [[t for t in row if t not in special] for row in out.tolist()]
