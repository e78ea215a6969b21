"""Several processes on one machine, as torchrun and accelerate start them.

Each rank is an evaluation of its own, on its own GPU, that takes whole units. A unit is never
split: no process group is needed while it runs, and its answers do not depend on the ranks.

Under ZeRO-3 the ranks are one team with one model instead: they do every unit together, share its
requests, and the first rank writes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from llava_hivtp.zero3 import Team

T = TypeVar("T")


@dataclass(frozen=True)
class Rank:
    """This process among those that share a run."""

    index: int = 0
    count: int = 1
    team: Team | None = None

    def order(self, items: Sequence[T]) -> list[T]:
        """Every rank's own share first, then the others', to help them out; a team's are one."""
        if self.team:
            return self.team.exchange(list(items))[0]
        own = list(items[self.index :: self.count])
        return own + [item for item in items if item not in own]

    def wait(self) -> None:
        """Wait for all ranks: torchrun ends the others when one leaves with an error."""
        if self.team:
            self.team.exchange(None)
            return
        if self.count == 1:
            return
        from torch import distributed

        from llava_hivtp.zero3 import PATIENCE

        distributed.init_process_group(
            "gloo", rank=self.index, world_size=self.count, timeout=PATIENCE
        )
        distributed.barrier()
        distributed.destroy_process_group()


@contextmanager
def own_rank(zero3: bool = False) -> Iterator[Rank]:
    """The rank of this process, hidden from lmms-eval, which would split every unit."""
    team = None
    if zero3:
        from llava_hivtp.zero3 import join

        team = join()
    hidden = {key: os.environ.pop(key) for key in ("RANK", "WORLD_SIZE") if key in os.environ}
    try:
        yield Rank(int(hidden.get("RANK", 0)), int(hidden.get("WORLD_SIZE", 1)), team)
    finally:
        os.environ.update(hidden)
