"""TTFT of transformers' LLaVA against the kept tokens, beside the ideal: what the cut costs.

    nice -n 15 python scripts/hf_ttft.py --out eval/measured/hf-ttft

Random weights of the 7B's width and tower, `--layers` layers of the language model; stock, unpruned
and HIVTP in turn, round by round. Rounds are kept in `--rounds-file` and not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ |= {"HF_HUB_OFFLINE": "1"}

import torch  # noqa: E402

from eval import machine  # noqa: E402
from eval.clock import Clock, Spread, Watch, ratios  # noqa: E402
from eval.efficiency.ideal import RequestSizes, stages  # noqa: E402
from eval.efficiency.report import write_csv  # noqa: E402
from eval.efficiency.stopwatch import Run, Stopwatch  # noqa: E402
from eval.efficiency.training import METHODS  # noqa: E402
from eval.markdown import pipes  # noqa: E402
from eval.untrained.random_hf_llava import random_hf_llava  # noqa: E402
from eval.untrained.shapes import Shape, shape  # noqa: E402
from llava_hivtp import attach, detach  # noqa: E402
from llava_hivtp.pruners import for_depth, read_pruner  # noqa: E402

STOCK, TEXT = "stock class", 64  # tokens beside the image
CUT = ("select", "splice")  # stages that hold what pruning adds; stock's has masks and embedding


def main() -> None:
    """Run the rounds that are left, write .csv and .md."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results/hf-ttft"))
    parser.add_argument("--rounds-file", type=Path, default=Path("results/hf-ttft.jsonl"))
    parser.add_argument("--shape", default="llava-v1.5-7b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    asked, file = shape(options.shape, options.layers), options.rounds_file
    lines = file.read_text().splitlines() if file.exists() else []
    done = [
        each for each in map(json.loads, lines) if each["model"] == [options.shape, asked.layers]
    ]
    if len(done) < options.rounds:
        model = random_model(asked)
        file.parent.mkdir(parents=True, exist_ok=True)
        serve_all(model)  # a warm-up
        for _ in range(len(done), options.rounds):
            done.append(serve_all(model) | {"model": [options.shape, asked.layers]})
            with file.open("a") as rounds:
                rounds.write(json.dumps(done[-1]) + "\n")
            print(f"round {len(done)}", file=sys.stderr)
    rows = list(counted(asked, [each["runs"] for each in done]))
    commits = {"commit": ", ".join(sorted({each["commit"] for each in done}))}
    found = machine.columns(torch.device("cpu")) | commits | {"dtype": "float32"}
    write_csv(options.out.with_name(options.out.name + ".csv"), [row | found for row in rows])
    share = Spread.of(each["worked"] for each in done).median
    text = report(asked, rows, found, share)
    options.out.with_name(options.out.name + ".md").write_text(text)
    print(text)


def random_model(asked: Shape) -> Any:
    """Transformers' LLaVA of a shape, in memory: a checkpoint's files without its weights."""
    from transformers import AutoConfig, LlavaForConditionalGeneration

    with tempfile.TemporaryDirectory() as folder:
        config = AutoConfig.from_pretrained(random_hf_llava(folder, asked, weights=False))
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    model.generation_config.eos_token_id = None
    return model


def serve_all(model: Any) -> dict[str, Any]:
    """Every case once, in turn: stages, prompt and kept tokens; and the share of time at work."""
    watch, runs = Watch(model.device), {}
    for name in (STOCK, *METHODS):
        with watch:
            run = serve(model, name)
        kept = 0 if name == STOCK else model.kept[0].patches
        runs[name] = {"stages": run.stages, "length": run.length, "kept": kept}
    return {"runs": runs, "worked": watch.share, "commit": machine.commit()}


def serve(model: Any, name: str) -> Run:
    """One request for one token; CPU time, so that others' work does not count."""
    config, vision = model.config, model.config.vision_config
    detach(model)
    if name != STOCK:
        attach(model, for_depth(read_pruner(name), vision.num_hidden_layers))
    generator = torch.Generator().manual_seed(0)
    side = vision.image_size // vision.patch_size
    ids = torch.randint(3, 99, (1, TEXT), generator=generator)
    image = torch.full((1, side * side), config.image_token_id)
    given = {"input_ids": torch.cat([ids[:, :1], image, ids[:, 1:]], 1)}
    shape_ = (1, 3, vision.image_size, vision.image_size)
    given["pixel_values"] = torch.randn(shape_, generator=generator)
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    stopwatch = Stopwatch(Clock(model.device, cpu_time=True))
    with torch.inference_mode(), stopwatch.watching(model):
        stopwatch.clock.start()
        model.generate(
            **given, do_sample=False, max_new_tokens=1, pad_token_id=0, streamer=stopwatch
        )
    return Run(stopwatch.stages(), tuple(stopwatch.tokens), stopwatch.length)


def counted(asked: Shape, rounds: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row per case; ratios to the unpruned model through our path, paired round by round."""
    ttft = {name: [sum(each[name]["stages"].values()) for each in rounds] for name in rounds[0]}
    ideal = {
        name: flops(asked, name, run["kept"], run["length"]) for name, run in rounds[0].items()
    }
    for name, run in rounds[0].items():
        ratio = ratios(ttft[name], ttft["none"])
        cut = [sum(each[name]["stages"][stage] for stage in CUT) for each in rounds]
        share = Spread.of(a / b for a, b in zip(cut, ttft[name], strict=True))
        seconds = {
            stage: Spread.of(each[name]["stages"][stage] for each in rounds).median
            for stage in run["stages"]
        }
        yield {
            "case": name,
            "length": run["length"],
            "ttft": Spread.of(ttft[name]).median,
            "ratio": ratio.median,
            "ratio_q1": ratio.low,
            "ratio_q3": ratio.high,
            "ideal_ratio": ideal[name] / ideal["none"],
            "cut_share": share.median,
            "cut_share_q3": share.high,
            "rounds": len(rounds),
            **{f"{stage}_s": value for stage, value in seconds.items()},
        }


def flops(asked: Shape, name: str, kept: int, length: int) -> float:
    """Arithmetic up to the first token; transformers asks for the last position's logits alone."""
    tower = asked.tower
    stock = name == STOCK  # runs the layer, too, that nobody reads
    depth, projected = (tower.layers, tower.patches) if stock else (tower.layers - 1, kept)
    whole = stages(asked, RequestSizes(1, 1, depth, projected, length), itemsize=4)
    return whole.flops - 2 * asked.width * asked.vocab * (length - 1)


def report(
    asked: Shape, rows: Sequence[dict[str, Any]], found: dict[str, str], share: float
) -> str:
    """The table and what it is about."""
    cells = [["case", "prompt", "TTFT s", "/ unpruned", "ideal", "tower s", "prefill s", "cut"]]
    cells += [
        [
            row["case"],
            str(row["length"]),
            f"{row['ttft']:.2f}",
            f"{row['ratio']:.3f} ({row['ratio_q1']:.3f}-{row['ratio_q3']:.3f})",
            f"{row['ideal_ratio']:.3f}",
            f"{row['tower_s']:.2f}",
            f"{row['prefill_s']:.2f}",
            f"{row['cut_share']:.2%}",
        ]
        for row in rows
    ]
    named = "; ".join(f"{name} {value}" for name, value in found.items() if value)
    return (
        f"`python scripts/hf_ttft.py`: {named}; CPU time\n\n"
        f"Random weights in transformers' LLaVA, width {asked.width}, {asked.layers} layers of the "
        f"language model, the tower's {asked.tower.layers} layers, {TEXT} text tokens, "
        f"{rows[0]['rounds']} rounds in turn: medians (quartiles). `cut` is the share of TTFT "
        "between tower and projector and between projector and language model: score, choice, the "
        "shorter prompt, masks and embedding, of which the stock class has the last two. Ideal: "
        "arithmetic. The timed calls worked "
        f"{share:.0%} of the time that passed.\n\n{pipes(cells, left=1)}\n"
    )


if __name__ == "__main__":
    main()
