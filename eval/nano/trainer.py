"""`python -m eval.nano.trainer`: `llava_hivtp.training`, for the embedded model's tokenizer.

LLaVA's trainer hides the prompt from the loss, but for its last two tokens: Llama's tokenizer makes
one of the space behind `ASSISTANT:`, the embedded model's does not, and would be taught to say
`ASSISTANT:`.
"""

import sys
from typing import Any

from llava.train import train as official

from llava_hivtp.training.__main__ import main

tokens_of = official.tokenizer_image_token


def tokens_with_space(prompt: str, tokenizer: Any, *args: Any, **options: Any) -> Any:
    """The tokens of a prompt, and one more where it ends in a space: they are only counted."""
    tokens = tokens_of(prompt, tokenizer, *args, **options)
    return [*tokens, tokenizer.unk_token_id] if prompt.endswith(" ") else tokens


if __name__ == "__main__":
    official.tokenizer_image_token = tokens_with_space
    sys.exit(main())
