"""The explorer's page: what is on it, and what happens on a click."""

from __future__ import annotations

from typing import Any

import gradio as gr
from PIL import Image

from eval.explorer.shared import (
    LIMITS,
    MAX_MEGABYTES,
    MAX_QUESTION,
    NO_WINDOWS,
    TIMED,
    SharedModel,
    TimedAnswer,
    check_question,
    examples,
    open_bounded,
    settings_of,
)
from eval.figures.questions import SHORT
from eval.plan.names import display_name
from llava_hivtp.pruners import PRUNERS

# The model serves one request at a time; while a slider moves, only its last place counts.
QUEUE = {"concurrency_limit": 1, "concurrency_id": "model", "trigger_mode": "always_last"}
QUICK = {"show_progress": "hidden", "trigger_mode": "always_last"}  # does not ask the model
STYLE = ".old { opacity: 0.35; filter: grayscale(1); }"
OLD = "The question or the settings have changed since this was answered: press **Ask**."
MISTAKES = (ValueError, TypeError)  # what a visitor can mend


class Controls:
    """The settings of a pruner, as widgets."""

    def __init__(self, shared: SharedModel) -> None:
        divisors, even = shared.divisors(), shared.side % 2 == 0
        self.method = gr.Dropdown(
            [(display_name(name), name) for name in PRUNERS], value="hivtp", label="Method"
        )
        self.r = gr.Dropdown(
            divisors, value=2 if even else 1, label="r: regions per side (global stage)"
        )
        self.k = gr.Slider(
            1, 100, 25, step=1, label="k: best % of each region (global stage)", elem_id="k"
        )
        self.c = gr.Dropdown(
            [NO_WINDOWS, *map(str, divisors)],
            value="2" if even else NO_WINDOWS,
            label="c: side of the windows (local stage)",
            elem_id="c",
        )
        self.keep = gr.Slider(
            1, 100, 50, step=1, label="Tokens to keep, %", visible=False, elem_id="keep"
        )
        self.layers = gr.Dropdown(
            list(range(1, shared.depth + 1)),
            value=shared.default_layers("hivtp"),
            multiselect=True,
            label="Encoder layers that score",
            elem_id="layers",
        )
        self.layout = gr.Radio(
            list(shared.layouts),
            value=shared.layouts[0],
            label="AnyRes layout",
            visible=shared.tiled,
        )

    @property
    def pruner(self) -> list[gr.components.Component]:
        """What `SharedModel.pruner` takes."""
        return [self.method, self.r, self.k, self.c, self.keep, self.layers]


class Asking:
    """Image and question, as widgets; the first example is there from the start."""

    def __init__(self, shared: SharedModel) -> None:
        drawn = examples(shared.tiled)
        picture, words = drawn[0]
        self.image = gr.State(picture)
        self.shown = gr.Image(picture, label="Image", interactive=False, height=250, buttons=[])
        self.upload = gr.UploadButton(
            f"Upload an image (up to {MAX_MEGABYTES} MB, {LIMITS.side} pixels a side)",
            size="sm",
            elem_id="upload",
        )
        self.gallery = gr.Gallery(
            [picture for picture, _ in drawn],
            show_label=False,
            columns=3,
            height=130,
            allow_preview=False,
            buttons=[],
            elem_id="examples",
        )
        self.question = gr.Textbox(
            words, label="Question", max_length=MAX_QUESTION, elem_id="question"
        )
        self.short = gr.Checkbox(True, label="Ask for a single word or phrase", elem_id="short")
        self.notes = gr.Markdown(elem_id="notes")
        self.ask = gr.Button("Ask", variant="primary", elem_id="ask")
        self.message = gr.Markdown(elem_id="message")


class Shown:
    """The drawing and both answers, as widgets."""

    def __init__(self) -> None:
        self.kept = gr.Image(
            show_label=False, interactive=False, buttons=["download"], elem_id="kept"
        )
        with gr.Row():
            self.full = gr.Textbox(label="Full model", interactive=False, elem_id="full")
            self.pruned = gr.Textbox(label="Pruned model", interactive=False, elem_id="pruned")
        with gr.Row():
            self.full_cost = gr.Markdown(elem_id="full-cost")
            self.pruned_cost = gr.Markdown(elem_id="pruned-cost")
        self.age = gr.Markdown(elem_id="age")

    @property
    def answers(self) -> list[gr.components.Component]:
        """What an answer fills, and what grows old: the full model's two, then the pruned one's."""
        return [self.full, self.full_cost, self.pruned, self.pruned_cost]


def build_page(shared: SharedModel, name: str) -> gr.Blocks:
    """Lay the page out and connect it."""
    with gr.Blocks(title="HIVTP explorer", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(
            f"## What a pruner keeps\n{name}, {shared.side} x {shared.side} patches a tile, "
            f"{shared.depth} encoder layers. TTFT: median (quartiles) of {TIMED} requests on "
            "this machine, full and pruned in turns."
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                asking = Asking(shared)
            with gr.Column(scale=2, min_width=300):
                controls = Controls(shared)
                status = gr.Markdown(elem_id="status")
            with gr.Column(scale=3, min_width=420):
                shown = Shown()
        gr.Markdown("Attention each patch receives, by encoder layer:")
        heat = gr.Image(show_label=False, interactive=False, buttons=["download"], elem_id="heat")
        _connect(page, Actions(shared), asking, controls, shown, status, heat)
    return page


def _connect(
    page: gr.Blocks,
    act: Actions,
    asking: Asking,
    controls: Controls,
    shown: Shown,
    status: gr.Markdown,
    heat: gr.Image,
) -> None:
    """What happens when something on the page changes."""
    image, question = asking.image, asking.question
    settings = [image, controls.layout, *controls.pruner]
    watched = [image, controls.layout, *controls.pruner[1:]]
    asked = [question, asking.short, *settings]
    answered = gr.State()  # what was asked, and how it was set, when the answers came
    asking.upload.upload(act.receive, asking.upload, [image, asking.shown, asking.message])
    asking.gallery.select(act.pick, None, [image, asking.shown, question, asking.message])
    controls.method.change(
        act.switch,
        controls.method,
        [controls.r, controls.k, controls.c, controls.keep, controls.layers],
    ).then(act.draw, asked, [shown.kept, status], **QUEUE)
    redrawn = [page.load, *(w.change for w in watched)]
    gr.on(redrawn, act.draw, asked, [shown.kept, status], **QUEUE)
    reworded = [question.change, asking.short.change]
    gr.on(reworded, act.follow, asked, [shown.kept, status], **QUEUE)
    rescored = [page.load, image.change, controls.layers.change]
    gr.on(rescored, act.heat, settings, heat, **QUEUE)
    gr.on(
        [page.load, image.change, question.change],
        act.notes,
        [image, question],
        asking.notes,
        **QUICK,
    )
    gr.on(
        [page.load, asking.ask.click, question.submit],
        act.reply,
        asked,
        [*shown.answers, asking.message, answered],
        **QUEUE,  # asked while the opening example is answered: it comes next
    )
    changed = [w.change for w in (*asked, answered)]
    gr.on(changed, act.mark, [answered, *asked], [*shown.answers, shown.age], **QUICK)


def launch(page: gr.Blocks, host: str, port: int) -> None:
    """Serve until interrupted; fonts and scripts come from this machine alone."""
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    page.queue(default_concurrency_limit=1).launch(
        server_name=host,
        server_port=port or None,
        max_file_size=f"{MAX_MEGABYTES}mb",
        theme=theme,
        css=STYLE,
        footer_links=["gradio"],
        share=False,
    )


class Actions:
    """What the widgets call; a setting or file that cannot be is answered in words."""

    def __init__(self, shared: SharedModel) -> None:
        self.shared = shared

    def receive(self, path: str) -> tuple:
        """An upload."""
        try:
            picture = open_bounded(path)
        except ValueError as error:
            return gr.skip(), gr.skip(), _complaint(error)
        return picture, picture, ""

    def pick(self, event: gr.SelectData) -> tuple:
        """One of the drawings."""
        picture, words = examples(self.shared.tiled)[event.index]
        return picture, picture, words, ""

    def switch(self, method: str) -> tuple:
        """Show the settings of a method, hide the others."""
        layers, known = self.shared.default_layers(method), settings_of(method)
        shown = (gr.update(visible=name in known) for name in ("r", "k", "c", "keep"))
        return *shown, gr.update(value=layers, visible=bool(layers))

    def draw(
        self,
        question: str,
        short: bool,
        picture: Image.Image | None,
        layout: str,
        *settings: Any,
    ) -> tuple:
        """The kept tokens, and the most that these settings keep."""
        try:
            prompt, pruner = _prompt(question, short), self.shared.pruner(*settings)
            drawing = self.shared.draw(picture, prompt, pruner, layout) if picture else None
        except MISTAKES as error:
            return None, _complaint(error)
        total = self.shared.side**2
        most = pruner.budget(1, total)
        words = f"Keeps at most **{most} of {total}** tokens a tile ({100 * most / total:.0f} %)."
        return drawing, words

    def follow(
        self, question: str, short: bool, picture: Any, layout: str, *settings: Any
    ) -> tuple:
        """Draw anew if the method reads the question."""
        if not PRUNERS[settings[0]].asks:
            return gr.skip(), gr.skip()
        return self.draw(question, short, picture, layout, *settings)

    def heat(self, picture: Image.Image | None, layout: str, *settings: Any) -> Any:
        """The heat map; what is wrong with the settings stands below them."""
        try:
            return self.shared.heat(picture, self.shared.pruner(*settings)) if picture else None
        except MISTAKES:
            return None

    def notes(self, picture: Image.Image | None, question: str) -> str:
        """What the model does not see of image and question."""
        try:
            return "\n\n".join(f"ℹ️ {note}" for note in self.shared.notes(picture, question))
        except MISTAKES as error:
            return _complaint(error)

    def reply(
        self,
        question: str,
        short: bool,
        picture: Image.Image | None,
        layout: str,
        *settings: Any,
    ) -> tuple:
        """Both answers and their costs, and what they answer."""
        try:
            if picture is None:
                raise ValueError("Upload an image or pick one first.")
            if not question.strip():
                raise ValueError("Type a question first.")
            prompt, pruner = _prompt(question, short), self.shared.pruner(*settings)
            full, pruned = self.shared.answers(picture, prompt, pruner, layout)
        except MISTAKES as error:
            return "", "", "", "", _complaint(error), None
        texts = full.answer.text, _cost(full), pruned.answer.text, _cost(pruned)
        return *texts, "", [question, short, picture, layout, *settings]

    def mark(self, answered: list | None, *now: Any) -> tuple:
        """Grey the answers that are no longer to what is asked, or not under what is set."""
        pairs = zip(answered or now, now, strict=True)
        changed = [then is not new and then != new for then, new in pairs]
        full, pruned = any(changed[:4]), any(changed)  # the first: question, short, image, layout
        marks = [gr.update(elem_classes=["old"] if old else []) for old in (full, pruned)]
        return marks[0], marks[0], marks[1], marks[1], OLD if pruned else ""


def _prompt(question: str, short: bool) -> str:
    check_question(question)
    return question.strip() + (f"\n{SHORT}" if short else "")


def _complaint(error: Exception) -> str:
    return f"⚠️ {error}"


def _cost(timed: TimedAnswer) -> str:
    ttft, ratio = timed.seconds, timed.ratio
    words = (
        f"**{timed.answer.patches} of {timed.answer.total}** patch tokens · "
        f"TTFT **{1000 * ttft.median:.0f} ms** "
        f"({1000 * ttft.low:.0f} to {1000 * ttft.high:.0f}) · "
        f"{timed.answer.generated} tokens answered"
    )
    if ratio.low == ratio.high == 1:  # the full model itself
        return words
    return f"{words} · TTFT / full **{ratio.median:.2f}** ({ratio.low:.2f} to {ratio.high:.2f})"
