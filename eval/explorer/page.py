"""The explorer's page: what is on it, and what happens on a click."""

from __future__ import annotations

from typing import Any

import gradio as gr
from PIL import Image

from eval.explorer.session import (
    MAX_FILE,
    MAX_QUESTION,
    MAX_SIDE,
    NO_WINDOWS,
    TIMED,
    Bench,
    examples,
    open_bounded,
)
from eval.figures.questions import SHORT
from eval.plan.names import display_name
from llava_hivtp.answer import Answer
from llava_hivtp.pruners import PRUNERS

# The model serves one request at a time; while a slider moves, only its last place counts.
QUEUE = {"concurrency_limit": 1, "concurrency_id": "model", "trigger_mode": "always_last"}


class Controls:
    """The settings of a pruner, as widgets."""

    def __init__(self, bench: Bench) -> None:
        divisors, even = bench.divisors(), bench.side % 2 == 0
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
            list(range(1, bench.depth + 1)),
            value=bench.default_layers("hivtp"),
            multiselect=True,
            label="Encoder layers that score",
            elem_id="layers",
        )
        self.layout = gr.Radio(
            ["unpad", "mosaic"], value="unpad", label="AnyRes layout", visible=bench.tiled
        )

    @property
    def pruner(self) -> list[gr.components.Component]:
        """What `Bench.pruner` takes."""
        return [self.method, self.r, self.k, self.c, self.keep, self.layers]


def build_page(bench: Bench, name: str) -> gr.Blocks:
    """Lay the page out and connect it."""
    with gr.Blocks(title="HIVTP explorer", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(
            f"## What a pruner keeps\n{name}, {bench.side} x {bench.side} patches a tile, "
            f"{bench.depth} encoder layers. TTFT: median of {TIMED} requests on this machine."
        )
        image = gr.State()
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                shown = gr.Image(label="Image", interactive=False, height=250, buttons=[])
                upload = gr.UploadButton(
                    f"Upload an image (up to {MAX_FILE}, {MAX_SIDE} pixels a side)",
                    size="sm",
                    elem_id="upload",
                )
                gallery = gr.Gallery(
                    [picture for picture, _ in examples(bench.tiled)],
                    show_label=False,
                    columns=3,
                    height=130,
                    allow_preview=False,
                    buttons=[],
                    elem_id="examples",
                )
                question = gr.Textbox(label="Question", max_length=MAX_QUESTION, elem_id="question")
                short = gr.Checkbox(True, label="Ask for a single word or phrase")
                ask = gr.Button("Ask", variant="primary", elem_id="ask")
                message = gr.Markdown(elem_id="message")
            with gr.Column(scale=2, min_width=300):
                controls = Controls(bench)
                status = gr.Markdown(elem_id="status")
            with gr.Column(scale=3, min_width=420):
                kept = gr.Image(
                    show_label=False, interactive=False, buttons=["download"], elem_id="kept"
                )
                with gr.Row():
                    full = gr.Textbox(label="Full model", interactive=False, elem_id="full")
                    pruned = gr.Textbox(label="Pruned model", interactive=False, elem_id="pruned")
                with gr.Row():
                    full_cost = gr.Markdown(elem_id="full-cost")
                    pruned_cost = gr.Markdown(elem_id="pruned-cost")
        gr.Markdown("Attention each patch receives, by encoder layer:")
        heat = gr.Image(show_label=False, interactive=False, buttons=["download"], elem_id="heat")
        act = Actions(bench)
        settings = [image, controls.layout, *controls.pruner]
        answers = [full, pruned, full_cost, pruned_cost, message]
        upload.upload(act.receive, upload, [image, shown, message])
        gallery.select(act.pick, None, [image, shown, question, message])
        controls.method.change(
            act.switch,
            controls.method,
            [controls.r, controls.k, controls.c, controls.keep, controls.layers],
        ).then(act.draw, settings, [kept, status], **QUEUE)
        watched = [image, controls.layout, *controls.pruner[1:]]
        gr.on([w.change for w in watched], act.draw, settings, [kept, status], **QUEUE)
        gr.on([image.change, controls.layers.change], act.heat, settings, heat, **QUEUE)
        gr.on([ask.click, question.submit], act.reply, [question, short, *settings], answers)
        page.load(act.draw, settings, [kept, status], **QUEUE)
    return page


def launch(page: gr.Blocks, host: str, port: int) -> None:
    """Serve until interrupted; fonts and scripts come from this machine alone."""
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    page.queue(default_concurrency_limit=1).launch(
        server_name=host,
        server_port=port or None,
        max_file_size=MAX_FILE,
        theme=theme,
        footer_links=["gradio"],
        share=False,
    )


class Actions:
    """What the widgets call; a setting or file that cannot be is answered in words."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def receive(self, path: str) -> tuple:
        """An upload."""
        try:
            picture = open_bounded(path)
        except ValueError as error:
            return gr.skip(), gr.skip(), _complaint(error)
        return picture, picture, ""

    def pick(self, event: gr.SelectData) -> tuple:
        """One of the drawings."""
        picture, words = examples(self.bench.tiled)[event.index]
        return picture, picture, words, ""

    def switch(self, method: str) -> tuple:
        """Show the settings of a method, hide the others."""
        layers = self.bench.default_layers(method)
        mine = gr.update(visible=method == "hivtp")
        share = gr.update(visible=method not in ("hivtp", "none"))
        return mine, mine, mine, share, gr.update(value=layers, visible=bool(layers))

    def draw(self, picture: Image.Image | None, layout: str, *settings: Any) -> tuple:
        """The kept tokens, and the most that these settings keep."""
        try:
            pruner = self.bench.pruner(*settings)
            drawing = self.bench.draw(picture, pruner, layout) if picture else None
        except ValueError as error:
            return None, _complaint(error)
        total = self.bench.side**2
        most = pruner.budget(1, total)
        words = f"Keeps at most **{most} of {total}** tokens a tile ({100 * most / total:.0f} %)."
        return drawing, words

    def heat(self, picture: Image.Image | None, layout: str, *settings: Any) -> Any:
        """The heat map; what is wrong with the settings stands below them."""
        try:
            return self.bench.heat(picture, self.bench.pruner(*settings)) if picture else None
        except ValueError:
            return None

    def reply(
        self,
        question: str,
        short: bool,
        picture: Image.Image | None,
        layout: str,
        *settings: Any,
    ) -> tuple[str, ...]:
        """Both answers and their costs."""
        try:
            if picture is None:
                raise ValueError("Upload an image or pick one first.")
            if not question.strip():
                raise ValueError("Type a question first.")
            prompt = question.strip() + (f"\n{SHORT}" if short else "")
            pruner = self.bench.pruner(*settings)
            full, pruned = self.bench.answers(picture, prompt, pruner, layout)
        except ValueError as error:
            return "", "", "", "", _complaint(error)
        return full.text, pruned.text, _cost(full), _cost(pruned, full), ""


def _complaint(error: Exception) -> str:
    return f"⚠️ {error}"


def _cost(answer: Answer, full: Answer | None = None) -> str:
    saved = f" ({100 * (answer.ttft / full.ttft - 1):+.0f} %)" if full else ""
    return (
        f"**{answer.image.patches} of {answer.image.total}** patch tokens · "
        f"TTFT **{1000 * answer.ttft:.0f} ms**{saved} · "
        f"{answer.generated} tokens answered"
    )
