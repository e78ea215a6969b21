"""Work done ahead comes in order, in bounds, and leaves nothing running."""

from __future__ import annotations

import random
import threading
import time

import pytest
from PIL import ImageFile

from llava_hivtp.ahead import made_ahead
from llava_hivtp.images import whole_files


def running():
    return [t for t in threading.enumerate() if t.name.startswith("ahead")]


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
def test_results_come_in_the_order_of_the_items(workers):
    rng = random.Random(0)
    pauses = [rng.random() / 200 for _ in range(60)]

    def make(i):
        time.sleep(pauses[i])
        return i

    with made_ahead(make, range(60), workers) as ready:
        assert list(ready) == list(range(60))
    assert not running()


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_no_more_is_made_than_may_wait(workers):
    begun = []
    with made_ahead(begun.append, range(50), workers) as ready:
        for taken, _ in enumerate(ready, 1):
            time.sleep(0.002)
            assert len(begun) <= taken + 2 * workers - 1


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_error_comes_in_its_turn_and_ends_the_work(workers):
    begun, taken = [], []

    def make(i):
        begun.append(i)
        if i == 5:
            raise OSError("image 5 is broken")
        return i

    def take():
        with made_ahead(make, range(99), workers) as ready:
            for i in ready:
                taken.append(i)

    with pytest.raises(OSError, match="image 5"):
        take()
    assert taken == [0, 1, 2, 3, 4]
    assert max(begun) <= 5 + 2 * workers
    assert not running()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_stop_leaves_nothing_running(error):
    def stopped():
        with made_ahead(lambda _: time.sleep(0.01), range(99), 2) as ready:
            next(ready)
            raise error

    with pytest.raises(error):
        stopped()
    assert not running()


def test_a_device_of_fixed_speed_waits_for_no_image():
    """30 ms to prepare, 20 ms on the device; neither uses the CPU."""

    def seconds(workers):
        begun = time.monotonic()
        with made_ahead(lambda _: time.sleep(0.03), range(16), workers) as ready:
            for _ in ready:
                time.sleep(0.02)
        return time.monotonic() - begun

    alone = seconds(0)  # ideal: 50 ms a request; a busy machine stretches all three alike
    assert seconds(1) < 0.85 * alone  # 30
    assert seconds(2) < 0.7 * alone  # 20


def test_files_are_whole_for_all_threads_until_the_last_is_done():
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True
    first, second = threading.Event(), threading.Event()

    def other():
        with whole_files():
            first.set()
            second.wait(5)

    thread = threading.Thread(target=other)
    try:
        with whole_files():
            thread.start()
            first.wait(5)
        assert not ImageFile.LOAD_TRUNCATED_IMAGES  # the other one still asks
        second.set()
        thread.join()
        assert ImageFile.LOAD_TRUNCATED_IMAGES
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before
