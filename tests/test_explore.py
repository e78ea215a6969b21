"""The explorer: settings that cannot be are refused in words; the page, driven in Chromium."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.explorer.session import MAX_SIDE, NO_WINDOWS, Bench, examples, open_bounded
from llava_hivtp import PRUNERS, load

CHROMIUM = shutil.which("chromium")
# Its own services would reach for the network.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
]
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def bench(tiny):
    model, tokenizer, *_ = load(tiny())
    return Bench(model, tokenizer)


@pytest.mark.parametrize("name", sorted(PRUNERS))
def test_every_method_can_be_chosen(bench, name):
    pruner = bench.pruner(name, 2, 25, "2", 50, bench.default_layers(name))
    picture, _ = examples(tiled=False)[0]
    drawing = bench.draw(picture, pruner, "unpad")
    assert min(drawing.size) > 200
    full, pruned = bench.answers(picture, "What is it?", pruner, "unpad")
    assert full.image.patches == 16
    assert 0 < pruned.image.patches <= pruner.budget(1, 16)
    assert full.ttft > 0


def test_r_and_c_offer_what_divides_the_grid_only(bench):
    assert bench.divisors() == [1, 2, 4]
    for r in bench.divisors():
        for c in [NO_WINDOWS, *map(str, bench.divisors())]:
            bench.pruner("hivtp", r, 100, c, 50, [2])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("hivtp", 2, 1, NO_WINDOWS, 50, [2]), "keeps no token"),
        (("hivtp", 2, 25, "2", 50, []), "layers is empty"),
        (("hired", 2, 25, "2", 50, [1, 2, 3]), "layers"),
        (("fopru", 2, 25, "2", 1, [2]), "keeps no token"),
    ],
)
def test_settings_that_cannot_be_are_explained(bench, settings, words):
    with pytest.raises(ValueError, match=words):
        bench.pruner(*settings)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Images good and bad, by name."""
    folder = tmp_path_factory.mktemp("uploads")
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "good.png")
    Image.new("L", (MAX_SIDE + 1, 2)).save(folder / "strip.png")
    Image.new("1", (20_000, 20_000)).save(folder / "giant.png")  # a small file, many pixels
    (folder / "words.png").write_text("this is no image")
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:2000])
    (folder / "heavy.png").write_bytes(bytes(21_000_000))
    return {path.stem: path for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("strip", f"strip.png is {MAX_SIDE + 1} x 2 pixels; {MAX_SIDE} a side are the most"),
        ("giant", f"giant.png is .*{MAX_SIDE}"),
        ("words", "words.png is no image that can be read"),
        ("cut", "cut.png is damaged and cannot be read"),
    ],
)
def test_a_bad_upload_is_refused_by_name_without_its_path(files, name, words):
    with pytest.raises(ValueError, match=words) as caught:
        open_bounded(files[name])
    assert str(files[name].parent) not in str(caught.value)


def test_a_good_upload_is_opened(files):
    assert open_bounded(files["good"]).size == (90, 60)


def test_a_missing_checkpoint_is_said_in_a_line(tmp_path):
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'llava_hivtp[demo]'")
    from typer.testing import CliRunner

    from eval.__main__ import app

    result = CliRunner().invoke(app, ["explore", "--model", str(tmp_path)])
    assert result.exit_code == 1
    assert "holds no config.json" in result.output


@pytest.fixture(scope="module")
def address(tiny, tmp_path_factory):
    """The page, served by the command itself."""
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'llava_hivtp[demo]'")
    log = tmp_path_factory.mktemp("explore") / "log"
    command = [sys.executable, "-m", "eval", "explore", "--port", "0"]
    environment = {**os.environ, "MODEL": str(tiny()), "PYTHONUNBUFFERED": "1"}
    with (
        log.open("w") as out,
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT
        ) as server,
    ):
        try:
            yield _wait_for(log, server), log
        finally:
            server.terminate()


def _wait_for(log, server, patience_s=400):
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline and server.poll() is None:
        found = re.search(r"http://127\.0\.0\.1:\d+", log.read_text())
        if found:
            return found[0]
        time.sleep(0.5)
    raise AssertionError(f"the page did not start:\n{log.read_text()}")


@pytest.fixture
def page(address):
    """A tab of a headless Chromium; what goes wrong in it fails the test."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    url, log = address
    wrong = []
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        tab = browser.new_page(viewport={"width": 1500, "height": 1100})
        tab.set_default_timeout(60_000)
        tab.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("request", lambda r: None if _is_local(r.url, url) else wrong.append(r.url))
        tab.goto(url)
        tab.wait_for_selector("#ask")
        tab.wait_for_function("document.querySelector('#status').innerText.includes('at most')")
        yield tab
        browser.close()
    assert wrong == []
    assert "Traceback" not in log.read_text()


def _is_local(address, url):
    return address.startswith((url, "data:", "blob:"))


def upload(page, path):
    page.locator("#upload input[type=file], input#upload, input[type=file]").first.set_input_files(
        str(path)
    )


def text_of(page, name):
    return page.locator(f"#{name}").inner_text()


def wait_for_text(page, name, words):
    page.wait_for_function(
        "([name, words]) => document.querySelector('#' + name)?.innerText.includes(words)",
        arg=[name, words],
    )


def picture(page, name):
    """Address of the picture that a part of the page shows; waits until it shows one."""
    image = page.locator(f"#{name} img").first
    image.wait_for()
    return image.get_attribute("src")


@pytest.mark.slow
def test_a_visitor_uploads_moves_a_slider_and_reads_both_answers(page, files):
    upload(page, files["good"])
    before = picture(page, "kept")
    picture(page, "heat")
    wait_for_text(page, "status", "8 of 16")
    page.locator("#k input[type=range]").fill("50")
    wait_for_text(page, "status", "12 of 16")
    page.wait_for_function(
        "before => document.querySelector('#kept img')?.getAttribute('src') !== before", arg=before
    )
    page.locator("#question textarea, #question input").first.fill("What is in the image?")
    page.locator("#ask").click()
    wait_for_text(page, "full-cost", "16 of 16 patch tokens")
    wait_for_text(page, "pruned-cost", "of 16 patch tokens")
    assert re.search(r"TTFT \d+ ms", text_of(page, "full-cost"))
    assert re.search(r"1[0-2] of 16 patch tokens.*TTFT \d+ ms", text_of(page, "pruned-cost"))
    for name in ("full", "pruned"):
        assert page.locator(f"#{name} textarea").input_value().strip()


@pytest.mark.slow
def test_a_drawing_can_be_picked_and_another_method_chosen(page):
    page.locator("#examples button").first.click()
    picture(page, "kept")
    assert page.locator("#question textarea, #question input").first.input_value()
    assert page.locator("#k").is_visible()
    page.get_by_label("Method").click()
    page.get_by_role("option", name="uniform grid").click()
    wait_for_text(page, "status", "8 of 16")
    page.locator("#keep input[type=range]").wait_for()
    assert not page.locator("#k").is_visible()
    assert not page.locator("#layers").is_visible()
    page.locator("#keep input[type=range]").fill("1")
    wait_for_text(page, "status", "keeps no token")


@pytest.mark.slow
def test_bad_files_get_a_message_and_leave_the_page_working(page, files):
    for name, words in (
        ("words", "no image that can be read"),
        ("cut", "is damaged"),
        ("giant", f"{MAX_SIDE} "),
        ("strip", f"{MAX_SIDE + 1} x 2 pixels"),
    ):
        upload(page, files[name])
        wait_for_text(page, "message", words)
    upload(page, files["heavy"])
    page.get_by_text("exceed the maximum").first.wait_for()
    page.locator("#ask").click()
    wait_for_text(page, "message", "Upload an image or pick one first")
    upload(page, files["good"])
    picture(page, "kept")
    page.locator("#ask").click()
    wait_for_text(page, "message", "Type a question first")
