"""Work done ahead or behind comes in order, in bounds, and leaves nothing running."""

from __future__ import annotations

import random
import threading
import time

import pytest
from PIL import ImageFile

from llava_hivtp.ahead import done_behind, made_ahead
from llava_hivtp.images import whole_files


def running():
    return [t for t in threading.enumerate() if t.name.startswith(("ahead", "behind"))]


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


@pytest.mark.parametrize("threaded", [False, True])
def test_what_is_done_behind_is_done_in_order_and_whole(threaded):
    done = []

    def do(i):
        time.sleep(0.002)
        done.append(i)

    with done_behind(do, threaded) as hand:
        for i in range(20):
            hand(i)
            assert len(done) >= i + (not threaded)  # at most one is on its way
    assert done == list(range(20))
    assert not running()


def test_the_caller_goes_on_while_an_item_is_done_behind():
    handed = threading.Event()

    def do(_):
        assert handed.wait(5)

    with done_behind(do) as hand:
        hand(0)
        handed.set()


@pytest.mark.parametrize("last", [False, True])
def test_an_error_behind_reaches_the_caller(last):
    def do(i):
        if i == 1:
            raise OSError("no space left")

    def work():
        with done_behind(do) as hand:
            for i in range(2 if last else 9):
                hand(i)

    with pytest.raises(OSError, match="no space left"):
        work()
    assert not running()


def test_a_stop_leaves_nothing_half_done_behind():
    done = []

    def do(i):
        time.sleep(0.05)
        done.append(i)

    def stopped():
        with done_behind(do) as hand:
            hand(0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert done == [0]
    assert not running()


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
