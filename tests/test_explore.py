"""The explorer: settings that cannot be are refused in words; the page, driven in Chromium."""

import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import requests
from PIL import Image

from eval.explorer.shared import (
    LIMITS,
    MAX_MEGABYTES,
    MAX_QUESTION,
    NO_WINDOWS,
    TIMED,
    SharedModel,
    examples,
    open_bounded,
)
from eval.nano import EMBEDDED
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
def shared(tiny):
    model, tokenizer, *_ = load(tiny())
    return SharedModel(model, tokenizer)


@pytest.mark.parametrize("name", sorted(PRUNERS))
def test_every_method_can_be_chosen(shared, name):
    pruner = shared.pruner(name, 2, 25, "2", 50, shared.default_layers(name))
    picture, _ = examples(tiled=False)[0]
    drawing = shared.draw(picture, "What is it?", pruner, "unpad")
    assert min(drawing.size) > 200
    full, pruned = shared.answers(picture, "What is it?", pruner, "unpad")
    assert full.answer.patches == 16
    assert 0 < pruned.answer.patches <= pruner.budget(1, 16)
    assert 0 < full.seconds.low <= full.seconds.median <= full.seconds.high
    assert pruned.seconds.count == pruned.ratio.count == TIMED
    assert full.ratio.median == 1


def test_threads_that_share_the_model_get_what_they_would_alone(shared):
    """One request at a time: a method set for one visitor never answers another."""
    image, layers = noise((60, 60)), [2]
    settings = [("hivtp", 2, k, "2", 50, layers) for k in (25, 50, 75, 100)]
    settings += [("random", 1, 1, NO_WINDOWS, keep, []) for keep in (25, 50, 75, 100)]

    def ask(setting):
        full, pruned = shared.answers(image, "What is it?", shared.pruner(*setting), "unpad")
        return [(a.answer.text, a.answer.patches) for a in (full, pruned)]

    alone = [ask(setting) for setting in settings]
    assert len({tuple(found[1]) for found in alone}) > 3
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(ask, settings * 2)) == alone * 2


def test_what_the_model_does_not_see_is_said():
    """The embedded model crops to a square and knows the words of its world only."""
    model, tokenizer, *_ = load(EMBEDDED)
    embedded = SharedModel(model, tokenizer)
    notes = embedded.notes(noise((288, 216)), "Is there an elephant or a zebra?")
    assert notes == [
        "The model sees the middle 216 x 216 of 288 x 216 pixels: it crops to a square.",
        "The model has no token for: elephant, zebra.",
    ]
    assert embedded.notes(noise((200, 200)), "Is there a circle in the image?") == []
    for picture, question in examples(tiled=False):
        assert embedded.notes(picture, question) == []


def noise(size):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


def test_r_and_c_offer_what_divides_the_grid_only(shared):
    assert shared.divisors() == [1, 2, 4]
    for r in shared.divisors():
        for c in [NO_WINDOWS, *map(str, shared.divisors())]:
            shared.pruner("hivtp", r, 100, c, 50, [2])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("hivtp", 2, 1, NO_WINDOWS, 50, [2]), "keeps no token"),
        (("hivtp", 2, 25, "2", 50, []), "layers is empty"),
        (("hired", 2, 25, "2", 50, [1, 2, 3]), "layers"),
        (("fopru", 2, 25, "2", 1, [2]), "keeps no token"),
    ],
)
def test_settings_that_cannot_be_are_explained(shared, settings, words):
    with pytest.raises(ValueError, match=words):
        shared.pruner(*settings)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Images good and bad, by name."""
    folder = tmp_path_factory.mktemp("uploads")
    noise((90, 60)).save(folder / "good.png")
    Image.new("L", (LIMITS.side + 1, LIMITS.side)).save(folder / "wide.png")
    Image.new("L", (2, 401)).save(folder / "strip.png")
    Image.new("1", (20_000, 20_000)).save(folder / "giant.png")  # a small file, many pixels
    (folder / "words.png").write_text("this is no image")
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:2000])
    (folder / "heavy.png").write_bytes(bytes(21_000_000))
    return {path.stem: path for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "wide",
            f"wide.png is {LIMITS.side + 1} x {LIMITS.side} pixels; at most {LIMITS.side} a side",
        ),
        ("strip", "strip.png is 2 x 401 pixels; one side may be 100 times the other"),
        ("heavy", f"heavy.png is larger than {MAX_MEGABYTES} MB"),
        ("giant", f"giant.png is .*{LIMITS.side}"),
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
def address(tmp_path_factory):
    """The page on the embedded model, served by the command itself."""
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'llava_hivtp[demo]'")
    log = tmp_path_factory.mktemp("explore") / "log"
    command = [sys.executable, "-m", "eval", "explore", "--port", "0"]
    environment = {k: v for k, v in os.environ.items() if k != "MODEL"} | {"PYTHONUNBUFFERED": "1"}
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
    wrong, before = [], len(log.read_text())
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
    assert "Traceback" not in log.read_text()[before:]


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


def said(page, name):
    return page.locator(f"#{name} textarea, #{name} input").first.input_value().strip()


def question(page):
    return page.locator("#question textarea, #question input").first


def wait_for_grey(page, *names):
    """Of the answers and their costs, these are greyed and no others."""
    page.wait_for_function(
        """names => ["full", "full-cost", "pruned", "pruned-cost"].every(name => {
            const opacity = getComputedStyle(document.getElementById(name)).opacity;
            return names.includes(name) === (opacity < 0.5);
        })""",
        arg=names,
    )


@pytest.mark.slow
def test_the_page_opens_with_an_example_answered(page):
    wait_for_text(page, "pruned-cost", "TTFT")
    assert question(page).input_value() == "What is written on the sign?"
    assert said(page, "full") == said(page, "pruned") == "HAND"
    assert "144 of 144 patch tokens" in text_of(page, "full-cost")
    cost = text_of(page, "pruned-cost")
    assert re.search(r"TTFT \d+ ms \(\d+ to \d+\).* full \d\.\d\d \(\d\.\d\d to", cost)
    assert "full" not in text_of(page, "full-cost")
    picture(page, "kept")
    picture(page, "heat")
    wait_for_grey(page)


@pytest.mark.slow
def test_the_command_prints_where_the_page_is_and_nothing_of_reading_weights(address):
    url, log = address
    said = log.read_text().split(url)[0]
    assert said == "* Running on local URL:  "


@pytest.mark.slow
def test_what_a_change_makes_old_is_greyed_until_it_is_asked_again(page):
    wait_for_text(page, "pruned-cost", "TTFT")
    slider = page.locator("#k input[type=range]")
    slider.fill("50")
    wait_for_grey(page, "pruned", "pruned-cost")  # the full model knows no k
    wait_for_text(page, "age", "changed since this was answered")
    slider.fill("25")
    wait_for_grey(page)
    question(page).fill("Is there a heart in the image?")
    wait_for_grey(page, "full", "full-cost", "pruned", "pruned-cost")
    page.locator("#ask").click()
    wait_for_grey(page)
    assert said(page, "full") == "Yes"
    assert text_of(page, "age").strip() == ""


@pytest.mark.slow
def test_a_visitor_uploads_moves_a_slider_and_reads_both_answers(page, files):
    before = picture(page, "kept")
    upload(page, files["good"])
    wait_for_text(page, "notes", "the middle 60 x 60 of 90 x 60 pixels")
    wait_for_another(page, before)
    wait_for_text(page, "status", "72 of 144")
    before = picture(page, "kept")
    page.locator("#k input[type=range]").fill("50")
    wait_for_text(page, "status", "108 of 144")
    wait_for_another(page, before)
    question(page).fill("Is there an elephant in the image?")
    wait_for_text(page, "notes", "no token for: elephant")
    page.locator("#ask").click()
    wait_for_grey(page)
    found = re.search(r"(\d+) of 144 patch tokens.*TTFT \d+ ms", text_of(page, "pruned-cost"))
    assert 72 < int(found[1]) <= 108
    assert said(page, "full")
    assert said(page, "pruned")


def wait_for_another(page, before):
    page.wait_for_function(
        "before => document.querySelector('#kept img')?.getAttribute('src') !== before", arg=before
    )


@pytest.mark.slow
def test_limits_hold_on_the_server_not_in_the_browser_only(address, files):
    """What is posted past the browser's own checks."""
    gradio_client = pytest.importorskip("gradio_client", reason="gradio is not installed")
    url, _ = address
    posted = gradio_client.Client(url, verbose=False)
    began = time.monotonic()
    words = f"The question has 33000 characters; {MAX_QUESTION} are the most."
    *_, message = posted.predict("a" * 33_000, api_name="/reply")
    assert words in message
    assert words in posted.predict("a" * 33_000, api_name="/notes")
    with pytest.raises(Exception, match="101"):
        posted.predict("Is it?", True, "unpad", "hivtp", 2, 101, "2", 50, [4], api_name="/draw")
    _, status = posted.predict(
        "a" * 33_000, True, "unpad", "cdpruner", 2, 25, "2", 50, [4], api_name="/draw"
    )
    assert words in status
    with files["heavy"].open("rb") as file:
        answer = requests.post(f"{url}/gradio_api/upload", files={"files": file}, timeout=60)
    assert answer.status_code == 413
    assert time.monotonic() - began < 20


@pytest.mark.slow
def test_a_drawing_can_be_picked_and_another_method_chosen(page):
    page.locator("#examples button").nth(1).click()
    picture(page, "kept")
    page.wait_for_function(
        "document.querySelector('#question textarea, #question input').value.includes('circle')"
    )
    assert page.locator("#k").is_visible()
    page.get_by_label("Method").click()
    page.get_by_role("option", name="uniform grid").click()
    wait_for_text(page, "status", "72 of 144")
    page.locator("#keep input[type=range]").wait_for()
    assert not page.locator("#k").is_visible()
    assert not page.locator("#layers").is_visible()
    page.locator("#keep input[type=range]").fill("1")
    wait_for_text(page, "status", "1 of 144")


@pytest.mark.slow
def test_a_method_that_reads_the_question_is_drawn_anew_with_it(page):
    page.get_by_label("Method").click()
    page.get_by_role("option", name="CDPruner").click()
    page.locator("#keep input[type=range]").wait_for()
    page.locator("#keep input[type=range]").fill("10")
    wait_for_text(page, "status", "14 of 144")
    before = picture(page, "kept")
    question(page).fill("Is there a white ring in the image?")
    wait_for_another(page, before)


@pytest.mark.slow
def test_bad_files_get_a_message_and_leave_the_page_working(page, files):
    for name, words in (
        ("words", "no image that can be read"),
        ("cut", "is damaged"),
        ("giant", f"{LIMITS.side} "),
        ("wide", f"{LIMITS.side + 1} x {LIMITS.side} pixels"),
        ("strip", "2 x 401 pixels"),
    ):
        upload(page, files[name])
        wait_for_text(page, "message", words)
    question(page).fill(" ")
    page.locator("#ask").click()
    wait_for_text(page, "message", "Type a question first")
    upload(page, files["heavy"])
    page.get_by_text("exceed the maximum").first.wait_for()
    upload(page, files["good"])
    wait_for_text(page, "notes", "the middle 60 x 60 of 90 x 60 pixels")
