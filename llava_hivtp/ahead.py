"""Work done ahead of the caller by threads, and behind it by one more, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def made_ahead(make: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[Iterator[R]]:
    """`make(item)` for every item, in the order of the items, while the caller does other things.

    At most `2 * workers` results wait or are in work: with fewer, of workers that end together one
    would wait until the caller has used a result. An error of an item comes where its result would
    come, behind all results before it. When the block ends, however it ends, nothing is left
    running; what was begun is finished first.

    Args:
        make: called in threads; with no workers by the caller, when a result is asked for.
        items: taken one by one, by the caller's thread.
        workers: threads.
    """
    if workers == 0:
        yield map(make, items)
        return
    with ThreadPoolExecutor(workers, "ahead") as threads:
        waiting: deque[Future[R]] = deque()
        try:
            yield _in_order(threads, make, iter(items), waiting, 2 * workers)
        finally:
            for future in waiting:
                future.cancel()


def _in_order(
    threads: ThreadPoolExecutor,
    make: Callable[[T], R],
    items: Iterator[T],
    waiting: deque[Future[R]],
    most: int,
) -> Iterator[R]:
    for item in items:
        waiting.append(threads.submit(make, item))
        if len(waiting) == most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@contextmanager
def done_behind(do: Callable[[T], None], threaded: bool = True) -> Iterator[Callable[[T], None]]:
    """A call that hands an item to `do`, which works on it while the caller does other things.

    One item is in work at a time, in the order of the calls: a call waits until the item before is
    done, and raises the error that it ended with. When the block ends, however it ends, the last
    item is done.

    Args:
        do: called in one thread of its own.
        threaded: otherwise by the caller, at once.
    """
    if not threaded:
        yield do
        return
    with ThreadPoolExecutor(1, "behind") as thread:
        last: Future[None] = Future()
        last.set_result(None)

        def hand(item: T) -> None:
            nonlocal last
            last.result()
            last = thread.submit(do, item)

        yield hand
        last.result()
