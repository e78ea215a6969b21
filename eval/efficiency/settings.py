"""What `python -m eval efficiency` was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llava_hivtp.anyres import LAYOUTS


@dataclass(frozen=True)
class Settings:
    """A model, how it runs, what it serves, how often, and where the files go."""

    model: str = ""  # a checkpoint
    random_weights: str = ""  # instead: a shape's name
    layers: int | None = None  # of the shape's language model
    device: str = ""
    dtype: str = ""
    attention: str = "sdpa"
    graphs: bool = False
    threads: int = 0
    cpu_time: bool = False
    table: Path | None = None
    rows: str = "paper"
    methods: tuple[str, ...] = ()
    layouts: tuple[str, ...] = ("unpad",)
    sizes: tuple[tuple[int, int], ...] = ((336, 336),)  # of images, (width, height)
    text: int = 64  # prompt tokens beside the image
    new_tokens: tuple[int, ...] = (2, 4, 10)
    batches: tuple[int, ...] = (1,)
    rounds: int = 20
    seconds: float = 0  # no round begins later; 0: no limit
    largest_batch: bool = False
    out: Path = Path("results/efficiency")

    def __post_init__(self) -> None:
        """Refuse what can be seen to be wrong."""
        if bool(self.model) == bool(self.random_weights):
            raise ValueError("give a checkpoint or --random-weights, one of the two")
        if unknown := set(self.layouts) - set(LAYOUTS):
            raise ValueError(f"--layout {unknown.pop()}: choose from {', '.join(LAYOUTS)}")
