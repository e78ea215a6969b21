"""The efficiency benchmark: its clocks are fair, its closed forms are what runs, it says no."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from eval import clock
from eval.clock import Spread
from eval.efficiency import (
    comparison,
    graphs,
    ideal,
    printed,
    report,
    request,
    timed_model,
    towers,
)
from eval.efficiency.cases import Case
from eval.efficiency.device import peak_bytes
from eval.efficiency.ideal import Ceilings, RequestSizes
from eval.efficiency.inputs import make_inputs as make_requests
from eval.efficiency.stopwatch import STAGES, Run, Stopwatch
from eval.untrained import models as untrained
from eval.untrained import shapes
from llava_hivtp.pruners import HIVTP, Pruner, build_pruner
from llava_hivtp.pruners.base import keep_mask

torch.set_num_threads(1)

CPU = torch.device("cpu")
TOWER = shapes.Encoder(width=32, mlp=64, layers=24, heads=4, side=56, patch=14)  # 4 x 4 patches
SMALL = shapes.Shape(32, 64, 2, 4, 4, vocab=320, tower=TOWER)
KINDS = {
    "v1.5": SMALL,
    "anyres": replace(SMALL, anyres=True),
    "mistral": replace(SMALL, anyres=True, mistral=True, kv_heads=2),
}
QUARTER = HIVTP(r=2, k=25, c=None)  # 4 of 16 tokens


@pytest.fixture(scope="module")
def models():
    return {
        name: untrained.random_model(shape, "cpu", torch.float32) for name, shape in KINDS.items()
    }


@pytest.fixture
def make_inputs(models):
    def make(kind, batch=1, text=20):
        model, _ = models[kind]
        size = (56, 56) if kind == "v1.5" else (120, 90)
        return make_requests(model, size, batch, text)

    return make


def cases():
    return [Case("stock", None), Case("none", build_pruner("none")), Case("quarter", QUARTER)]


# Clocks and statistics


def test_runs_take_turns_and_the_warm_up_is_thrown_away():
    order = []
    runs = {name: lambda name=name: order.append(name) or len(order) for name in "ABC"}
    results = clock.interleave(runs, rounds=2, warmup=1)
    assert "".join(order) == "ABCABCABC"
    assert results == {"A": [4, 7], "B": [5, 8], "C": [6, 9]}


def test_no_round_begins_after_its_time_but_one_is_done():
    results = clock.interleave({"A": int, "B": int}, rounds=9, warmup=1, until=0)
    assert results == {"A": [0], "B": [0]}


def test_quartiles_enclose_the_median():
    spread = Spread.of([5, 1, 4, 2, 3])
    assert (spread.low, spread.median, spread.high, spread.count) == (2, 3, 4, 5)
    assert Spread.of([7]) == Spread(7, 7, 7, 1)


def test_a_difference_is_called_only_where_quartiles_do_not_overlap():
    assert Spread(1, 0.9, 1.1, 9).apart(Spread(1.3, 1.2, 1.4, 9))
    assert not Spread(1, 0.9, 1.25, 9).apart(Spread(1.3, 1.2, 1.4, 9))


def test_ratios_are_paired_so_that_a_drift_cancels():
    drift = [1, 2, 4, 8]
    assert clock.ratios([2 * d for d in drift], drift) == Spread(2, 2, 2, 4)


def test_peak_memory_is_what_was_alive_at_once():
    def run():
        first = torch.empty(1 << 20, dtype=torch.uint8)
        second = torch.empty(1 << 20, dtype=torch.uint8)
        del first, second
        return torch.empty(1 << 20, dtype=torch.uint8)

    assert peak_bytes(run, CPU) == pytest.approx(2 << 20, abs=4096)


@pytest.mark.parametrize("most", [1, 2, 7, 33, 100])
@pytest.mark.parametrize("guess", [1, 8, 100, 500])
def test_the_largest_batch_is_found_within_an_eighth(most, guess):
    found = timed_model.largest(lambda batch: batch <= most, guess)
    assert most - max(1, most // 8) < found <= most


@pytest.mark.parametrize("guess", [1, 50])
def test_nothing_fits(guess):
    assert timed_model.largest(lambda batch: False, guess) == 0


def test_rooms_start_from_what_a_request_was_measured_to_take(monkeypatch):
    tried = []

    def fits(made, case, size, batch):
        tried.append((case.label, batch))
        return batch <= (40 if case.pruner is None else 90)

    monkeypatch.setattr(timed_model.TimedModel, "_fits", fits)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 200))
    names = [Case("stock", None), Case("none", build_pruner("none")), Case("hivtp", QUARTER)]
    results = [fake_result(case, STOCK, 640, jitter=0) for case in names]
    results = [replace(result, peak=2) for result in results]
    made = object.__new__(timed_model.TimedModel)
    made.device = CPU
    assert list(timed_model.TimedModel.largest_batches(made, results)) == [
        "Largest batch that fits, stock: 39 (1.00 of stock's).",
        "Largest batch that fits, hivtp: 87 (2.23 of stock's).",
    ]
    assert tried[0] == ("stock", 50)
    assert not any(label == "none" for label, _ in tried)


# Requests


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_stages_add_up_to_the_time_to_first_token(models, make_inputs, kind, case):
    run = request.run_request(models[kind][0], case, make_inputs(kind), new_tokens=3)
    assert tuple(run.stages) == STAGES
    assert all(seconds >= 0 for seconds in run.stages.values())
    assert math.isclose(sum(run.stages.values()), run.ttft, rel_tol=1e-9)
    assert list(run.tokens) == sorted(run.tokens)


def test_a_method_that_projects_tokens_to_score_them_is_charged_to_select(models, make_inputs):
    class Slow(HIVTP):
        def select(self, features):
            for _ in range(3):
                features.project(features.tokens)
            return super().select(features)

    model, _ = models["v1.5"]
    calls = []
    hook = model.get_model().mm_projector.register_forward_hook(lambda *_: calls.append(1))
    run = request.run_request(model, Case("slow", Slow()), make_inputs("v1.5"), new_tokens=1)
    hook.remove()
    assert len(calls) == 4
    assert math.isclose(sum(run.stages.values()), run.ttft, rel_tol=1e-9)


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_every_method_writes_equally_many_tokens_whatever_they_are(models, make_inputs, case):
    model, _ = models["v1.5"]
    model.generation_config.eos_token_id = list(range(model.config.vocab_size))
    assert len(request.run_request(model, case, make_inputs("v1.5"), new_tokens=5).tokens) == 5


def test_the_stock_case_is_stock(models, make_inputs):
    model, _ = models["v1.5"]
    request.run_request(model, Case("quarter", QUARTER), make_inputs("v1.5"), new_tokens=1)
    request.run_request(model, Case("stock", None), make_inputs("v1.5"), new_tokens=1)
    assert type(model).__module__.startswith("llava.")


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_pruned_is_as_long_as_stock_and_a_quarter_shorter(models, make_inputs, kind):
    lengths = [
        request.run_request(models[kind][0], case, make_inputs(kind), new_tokens=1).length
        for case in cases()
    ]
    assert lengths[0] == lengths[1] > lengths[2]


def test_hooks_are_gone_after_a_request_even_if_it_fails(models, make_inputs):
    class Broken(HIVTP):
        def select(self, features):
            raise RuntimeError("broken")

    def hooks():  # transformers has some of its own
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    model, _ = models["v1.5"]
    before = hooks()
    with pytest.raises(RuntimeError, match="broken"):
        request.run_request(model, Case("broken", Broken()), make_inputs("v1.5"), new_tokens=1)
    assert hooks() == before
    request.run_request(model, Case("quarter", QUARTER), make_inputs("v1.5"), new_tokens=2)
    assert hooks() == before


PLACES = ["cpu"] + ["cuda"] * torch.cuda.is_available()  # only a GPU records


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["v1.5", "anyres", "mistral"])
def test_graphs_give_equal_tokens(place, kind):
    shape = replace(KINDS[kind], layers=3)
    model, _ = untrained.random_model(shape, place, torch.float32)
    made = graphs.Graphs(model)
    for batch, length in ((1, 20), (2, 33), (1, 20)):  # again: now recorded
        inputs = make_requests(model, (56, 56) if kind == "v1.5" else (120, 90), batch, length)
        for case in (*cases(), Case("ragged", HIVTP(r=2, k=25, c=2))):
            request.choose(model, case)
            given = inputs.given if case.pruner else request.as_stock(model, inputs.given)
            model.generation_config.eos_token_id = None
            with torch.inference_mode():
                plain = model.generate(
                    inputs.prompt, do_sample=False, max_new_tokens=8, pad_token_id=0, **given
                )
                stopwatch = Stopwatch(clock.Clock(model.device))
                ours = made.generate(inputs.prompt, given, 8, stopwatch)
            assert torch.equal(ours, plain.cpu()), case.label


@pytest.mark.parametrize("kind", KINDS)
def test_graphs_replay_without_host_or_python(kind):
    """What a GPU would replay, on a device that repeats recorded work in the same memory."""
    from pretend import Pretend, moved

    def capture(run):
        recordings.append(device.record(run))
        return recordings[-1]

    recordings, counts = [], []
    model, _ = untrained.random_model(replace(KINDS[kind], layers=3), "cpu", torch.float32)
    there = moved(model)
    made, size = graphs.Graphs(there, capture), (56, 56) if kind == "v1.5" else (120, 90)
    for batch, length in ((1, 20), (2, 33), (1, 20), (1, 19)):
        for case in (*cases(), Case("ragged", HIVTP(r=2, k=25, c=2))):
            inputs = make_requests(model, size, batch, length)
            request.choose(model, case)
            given = inputs.given if case.pruner else request.as_stock(model, inputs.given)
            expected = model.generate(inputs.prompt, **given, max_new_tokens=5)
            request.choose(there, case)
            with torch.no_grad(), Pretend() as device:
                given = inputs.given if case.pruner else request.as_stock(there, given)
                prompt = inputs.prompt.to(there.device)
                stopwatch = Stopwatch(clock.Clock(there.device))
                found = made.generate(prompt, given, 5, stopwatch)
            assert torch.equal(found, expected), case.label
        counts.append(len(recordings))
    assert counts[0] < counts[1] == counts[2]


def test_graphs_mask_no_prompt_whose_rows_are_full(monkeypatch, models, make_inputs):
    """A mask would make attention compute the whole square: dearer for the longer prompt."""
    prefills, attend = [], torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, value, attn_mask=None, **options):
        if query.shape[2] == 32 and query.shape[1] == SMALL.heads:  # 4 + 20 positions, padded
            prefills.append((attn_mask, options["is_causal"]))
        return attend(query, key, value, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    model, _ = models["v1.5"]
    run = request.run_request(
        model, Case("quarter", QUARTER), make_inputs("v1.5", 2), 3, graphs=graphs.Graphs(model)
    )
    assert run.length == 24
    assert prefills == [(None, True)] * SMALL.layers


def test_graphs_pad_rows_of_different_lengths(models, make_inputs):
    class Ragged(Pruner):
        seeded = True

        def select(self, features):
            some = torch.arange(features.n_patches) < 2 + features.key % 13
            return keep_mask(features, some.expand(features.n_tiles, -1))

    model, _ = models["v1.5"]
    made, inputs = graphs.Graphs(model), make_inputs("v1.5", batch=2)
    request.choose(model, Case("ragged", Ragged()))
    pictures = torch.randn(8, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    model.encode_images(pictures)
    counts = [len(image.kept) for image in model.kept]
    images = pictures[[counts.index(min(counts)), counts.index(max(counts))]]

    def answer(prompt, pixels):
        stopwatch = Stopwatch(clock.Clock(CPU))
        with torch.inference_mode():
            given = {"images": pixels, "image_sizes": None}
            return made.generate(prompt, given, 6, stopwatch), len(model.kept[0].kept)

    first, few = answer(inputs.prompt[:1], images[:1])
    second, many = answer(inputs.prompt[:1], images[1:])
    assert few != many
    assert torch.equal(answer(inputs.prompt, images)[0], torch.cat([first, second]))


def test_graphs_time_the_same_stages_and_leave_the_tower_as_it_was(models, make_inputs):
    model, _ = models["anyres"]
    made, inputs = graphs.Graphs(model), make_inputs("anyres")
    for case in cases():
        plain = request.run_request(model, case, inputs, 3)
        run = request.run_request(model, case, inputs, 3, graphs=made)
        assert tuple(run.stages) == STAGES
        assert all(seconds >= 0 for seconds in run.stages.values())
        assert math.isclose(sum(run.stages.values()), run.ttft, rel_tol=1e-9)
        assert (run.length, len(run.tokens)) == (plain.length, 3)
    assert not any("forward" in vars(module) for module in model.modules())


def test_graphs_do_without_what_they_cannot_mask():
    model, _ = untrained.random_model(SMALL, "cpu", torch.float32, "eager")
    with pytest.raises(ValueError, match="--attention sdpa"):
        graphs.Graphs(model)


# Closed forms


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_closed_form_flops_are_those_torch_counts(models, make_inputs, kind, batch, case):
    model, _ = models[kind]
    inputs = make_inputs(kind, batch)
    run, counted = timed_model.count_flops(lambda: request.run_request(model, case, inputs, 1))
    sizes = request.sizes_of(model, case, inputs, run)
    layers = len(case.pruner.layers) if case.pruner else 0
    scored = ideal.score_flops(KINDS[kind], batch * sizes.tiles, layers)
    assert counted == ideal.stages(KINDS[kind], sizes, 4).flops + scored


@pytest.mark.parametrize("kind", KINDS)
def test_closed_forms_follow_what_is_dropped_between_layers(models, make_inputs, kind):
    model, _ = models[kind]
    inputs, shape = make_inputs(kind), KINDS[kind]
    case = Case("fastv", build_pruner("fastv", after=1, keep=0.5))
    run, counted = timed_model.count_flops(lambda: request.run_request(model, case, inputs, 1))
    sizes = request.sizes_of(model, case, inputs, run)
    image = run.length - inputs.text
    assert sizes.lengths == (run.length, inputs.text + image // 2)
    # The first layer's keys made again, the last row's queries, and what it attends to.
    again = 2 * shape.width * (run.length * (shape.kv_width + 1) + shape.width)
    assert counted == ideal.stages(shape, sizes, 4).flops + again
    half = replace(sizes, length=inputs.text + image // 2, lengths=())
    whole, pruned = (
        ideal.cache_bytes(shape, each, 4) for each in (replace(half, length=run.length), half)
    )
    assert ideal.cache_bytes(shape, sizes, 4) == (whole + pruned) / 2
    with pytest.raises(ValueError, match="fastv drops tokens inside the language model: no --gra"):
        request.run_request(model, case, inputs, 1, graphs=graphs.Graphs(model))


@pytest.mark.parametrize("kind", KINDS)
def test_closed_form_cache_is_the_cache(models, make_inputs, kind):
    model, _ = models[kind]
    found = []

    def measure_cache(module, inputs, output):
        layers = output.past_key_values.layers
        found.append(sum(layer.keys.nbytes + layer.values.nbytes for layer in layers))

    case, inputs = cases()[2], make_inputs(kind, batch=2)
    hook = model.register_forward_hook(measure_cache)
    run = request.run_request(model, case, inputs, new_tokens=3)
    hook.remove()
    sizes = request.sizes_of(model, case, inputs, run)
    assert found == [ideal.cache_bytes(KINDS[kind], sizes, 4, step) for step in range(3)]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llava-v1.5-7b", 6_738_415_616),
        ("llava-v1.5-13b", 13_015_864_320),
        ("llava-v1.6-mistral-7b", 7_241_732_096),
    ],
)
def test_published_shapes_have_the_published_parameters(name, parameters):
    model, _ = untrained.random_model(shapes.shape(name), "meta", torch.float16)
    towers = sum(
        p.numel()
        for part in (model.get_vision_tower(), model.get_model().mm_projector)
        for p in part.parameters()
    )
    newline = 4096 if shapes.shape(name).anyres else 0
    assert sum(p.numel() for p in model.parameters()) - towers - newline == parameters
    assert shapes.shape_of(model) == shapes.shape(name)


def test_an_unknown_shape_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"llava-v9.*choose from llava-v1.5-7b"):
        shapes.shape("llava-v9")


def test_decoding_is_bound_by_bytes_and_prefill_by_arithmetic():
    a40 = Ceilings(flops=150e12, bytes=0.7e12)
    shape = shapes.shape("llava-v1.5-7b")
    sizes = RequestSizes(batch=1, tiles=1, depth=23, projected=576, length=640)
    step, prefill = ideal.decode(shape, sizes, 2, 1), ideal.stages(shape, sizes, 2).prefill
    assert step.seconds(a40) == step.bytes / a40.bytes
    assert prefill.seconds(a40) == prefill.flops / a40.flops
    # 6.7 G weights less the embedding, in two bytes each.
    assert step.bytes == pytest.approx(2 * (6_738_415_616 - 32000 * 4096), rel=0.03)


# Reports


def fake_result(case, seconds, length, rounds=9, jitter=0.01):
    """A result whose stages took `seconds`, with a few percent between the rounds."""
    setting = comparison.Setting(
        "fake", shapes.shape("llava-v1.5-7b"), "float16", 2, (336, 336), 64, Ceilings(1e14, 1e12)
    )
    runs = []
    for number in range(rounds):
        factor = 1 + jitter * (number % 3 - 1)
        stages = {name: factor * seconds.get(name, 0.0) for name in STAGES}
        ttft = sum(stages.values())
        runs.append(Run(stages, (ttft, ttft + 0.02 * factor), length))
    projected = length - 64
    sizes = RequestSizes(1, 1, 24 if case.pruner is None else 23, projected, length)
    return comparison.Result(setting, case, tuple(runs), sizes, peak=1, flops=1)


STOCK = {"tower": 0.010, "prefill": 0.090}


@pytest.mark.parametrize(
    ("seconds", "length", "words"),
    [
        ({"tower": 0.010, "prefill": 0.030}, 206, ["TTFT 0.40", "ideal 0.3"]),
        ({"tower": 0.010, "prefill": 0.085}, 206, ["of stock's", "To blame: prefill"]),
        ({"tower": 0.010, "prefill": 0.091}, 206, ["GAINS NOTHING", "To blame: prefill"]),
        ({"tower": 0.010, "select": 0.07, "prefill": 0.030}, 206, ["GAINS NOTHING", "select"]),
        ({"tower": 0.010, "splice": 0.08, "prefill": 0.030}, 206, ["GAINS NOTHING", "splice"]),
        ({"tower": 0.010, "prefill": 0.090}, 636, ["GAINS NOTHING", "No more can be had"]),
    ],
)
def test_the_verdict_names_the_stage_to_blame(seconds, length, words):
    stock = fake_result(Case("stock", None), STOCK, 640)
    ours = fake_result(Case("hivtp", QUARTER, block=25), seconds, length)
    said = comparison.Comparison(ours, stock).verdict()
    assert all(word in said for word in words), said


def test_noise_is_called_neither_gain_nor_loss():
    stock = fake_result(Case("stock", None), STOCK, 640, jitter=0)
    ours = fake_result(
        Case("hivtp", QUARTER, block=25), {"tower": 0.01, "prefill": 0.08}, 206, jitter=0.5
    )
    assert "UNDECIDED" in comparison.Comparison(ours, stock).verdict()


def test_methods_of_one_block_are_compared_and_only_clear_differences_called():
    ours = fake_result(Case("hivtp-25", QUARTER, block=25), {"prefill": 0.030}, 206)
    like = fake_result(Case("like", build_pruner("none"), block=25), {"prefill": 0.0301}, 206)
    slow = fake_result(Case("slow", build_pruner("none"), block=25), {"prefill": 0.040}, 206)
    other = fake_result(Case("other", build_pruner("none"), block=50), {"prefill": 0.040}, 206)
    said = comparison.differences([ours, like, slow, other])
    assert [s.split(" (")[0] for s in said] == [
        "hivtp-25 against like: no difference",
        "hivtp-25 against slow: earlier",
    ]


def test_throughput_is_tokens_over_the_whole_request():
    run = Run({}, (0.1, 0.12, 0.14, 0.16), 206)
    assert run.throughput(4, batch=2) == pytest.approx(8 / 0.16)
    assert run.per_token() == pytest.approx(0.02)


def test_the_command_writes_csv_markdown_and_plot(monkeypatch, tmp_path):
    from eval.__main__ import app

    monkeypatch.setitem(shapes.SHAPES, "tiny-anyres", KINDS["anyres"])
    words = [
        *("efficiency", "--random-weights", "tiny-anyres", "--method", "hivtp:r=2,k=25,c=none"),
        *("--size", "120x90", "--layout", "unpad,mosaic", "--text", "20", "--new-tokens", "1,3"),
        *("--rounds", "2", "--device", "cpu", "--threads", "1", "--seconds", "60"),
        *("--out", str(tmp_path / "v1.5")),
    ]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    with (tmp_path / "v1.5.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["layout"]) for row in rows] == [
        ("stock", "unpad"),
        ("none", "unpad"),
        ("none", "mosaic"),
        ("hivtp:r=2,k=25,c=none", "unpad"),
        ("hivtp:r=2,k=25,c=none", "mosaic"),
    ]
    assert all(float(row["ttft_vs_stock"]) > 0 and row["torch"] and row["rounds"] for row in rows)
    assert rows[0]["image_tokens"] == rows[1]["image_tokens"]
    said = (tmp_path / "v1.5.md").read_text()
    assert "hivtp:r=2,k=25,c=none, mosaic" in said
    assert "Preparing the pixels" in said
    assert (tmp_path / "v1.5-120x90-batch1.png").stat().st_size > 1000


def test_the_tap_benchmark_compares_three_ways(monkeypatch, tmp_path):
    from eval.__main__ import app

    monkeypatch.setitem(shapes.SHAPES, "tiny", SMALL)
    words = ["tap", "--encoder", "tiny", "--tiles", "1,2", "--rounds", "2", "--device", "cpu"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "t")], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    with (tmp_path / "t.csv").open() as file:
        rows = {(row["tiles"], row["what"]): row for row in csv.DictReader(file)}
    for tiles in ("1", "2"):
        gross = float(rows[tiles, "gross cost"]["ms"])
        assert 0 < float(rows[tiles, "tap"]["ms"]) <= gross
        assert float(rows[tiles, "output_attentions=True"]["peak_ratio"]) > 1
    tap_bytes = {int(rows[t, "scoring"]["tap_bytes"]) // int(t) for t in ("1", "5", "80")}
    assert tap_bytes == {ideal.tap_bytes(SMALL, 4, 4)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--random-weights", "llava-v9"], "choose from"),
        (["--random-weights", "tiny", "--method", "hivpt"], "unknown pruner"),
        (["--random-weights", "tiny", "--layout", "mosaik"], "mosaik"),
        (["--random-weights", "tiny", "--size", "336"], "WIDTHxHEIGHT"),
        (["--random-weights", "tiny", "--new-tokens", "0"], "whole numbers"),
        ([], "one of the two"),
    ],
)
def test_a_wrong_option_is_named(words, message):
    from eval.__main__ import app

    done = CliRunner().invoke(app, ["efficiency", *words])
    assert done.exit_code in (1, 2)
    assert message in " ".join(done.output.replace("│", " ").split())


def test_closed_forms_need_no_run():
    from eval.__main__ import app

    words = ["efficiency", "--ceilings", "149.7,696", "--new-tokens", "2,64"]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    (v15,) = (line for line in done.output.splitlines() if line.startswith("| llava-v1.5-7b"))
    _, _, tokens, batch, ttft, two, many, ends, _ = (cell.strip() for cell in v15.split("|"))
    assert (tokens, batch) == ("576 to 144", "1")
    assert 0.25 < float(ttft) < 0.4
    assert float(two) > float(many) > 1
    assert 2 < int(ends.split()[0]) < 64


def test_closed_forms_take_the_ceilings_of_a_results_file(tmp_path):
    from eval.__main__ import app

    path = tmp_path / "v1.5.csv"
    found = {"dtype": "float32", "ceiling_gflops": "90.0", "ceiling_gbytes": "10.0"}
    report.write_csv(path, [found])
    said = [
        CliRunner().invoke(app, ["efficiency", "--ceilings", words], catch_exceptions=False).output
        for words in (str(path), "0.09,10")
    ]
    assert "in 32 bits at 0.09 TFLOP/s and 10 GB/s" in said[0]
    assert "is below 18 tokens" in said[0]
    assert "in 16 bits" in said[1]
    missing = CliRunner().invoke(app, ["efficiency", "--ceilings", "none.csv"])
    assert missing.exit_code == 1
    assert missing.output.startswith("error: ceilings none.csv")


def test_decoding_is_compared_apart_from_the_first_token():
    stock = fake_result(Case("stock", None), STOCK, 640)
    ours = fake_result(Case("hivtp", QUARTER, block=25), {"prefill": 0.030}, 206)
    found = comparison.Comparison(ours, stock)
    assert found.decode.median == pytest.approx(1)  # all take 20 ms per token
    assert 1 < found.ideal_decode(2) < 1.2  # the cache is shorter, the weights are not


def test_the_papers_times_stand_beside_ours():
    from eval.plan.table import load_table

    (*_, last) = printed.printed_ratios(
        load_table(Path(__file__).parents[1] / "configs/table1.yaml")
    )
    assert last.id == "hivtp-25"
    assert (round(last.ttft, 2), round(last.throughput, 2)) == (0.5, 1.61)
    assert printed.printed_ratios(None) == []


def test_the_commands_are_there_without_torch():
    program = "import sys, eval.__main__; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_both_towers_of_the_tap_benchmark_are_one():
    made = towers.Towers.build(TOWER, CPU, torch.float32, cpu_time=False)
    pixels = torch.randn(2, 3, 56, 56)
    torch.testing.assert_close(
        made.eager(pixels).last_hidden_state, made.stock(pixels).last_hidden_state
    )
    shared = zip(made.stock.parameters(), made.eager.parameters(), strict=True)
    assert all(ours.data_ptr() == theirs.data_ptr() for ours, theirs in shared)


def test_preparation_goes_on_where_it_stopped(tmp_path, monkeypatch):
    from eval.__main__ import app
    from eval.efficiency import preparation

    measured, measure = [], preparation._measure

    def counted(mode, size, rounds):
        measured.append((mode, size))
        if len(measured) == 2:
            raise KeyboardInterrupt
        return measure(mode, size, rounds)

    monkeypatch.setattr(preparation, "SIZES", ((60, 40), (50, 70)))
    monkeypatch.setattr(preparation, "SIDE", 28)
    monkeypatch.setattr(preparation, "_measure", counted)
    words = ["preparation", "--rounds", "2", "--out", str(tmp_path / "p")]
    CliRunner().invoke(app, words)
    assert len(measured) == 2
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert measured.count(("pad", (60, 40))) == 1
    assert len(measured) == 7
    assert (tmp_path / "p.md").read_text() == done.output
    with (tmp_path / "p.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["mode"], row["image"]) for row in rows} == {
        (mode, size) for mode in ("pad", "anyres", "crop") for size in ("60x40", "50x70")
    }
