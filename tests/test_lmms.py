"""The lmms-eval model: equal to lmms-eval's own `llava` where nothing is pruned."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from eval.benchmarks.records import BENCHMARKS
from eval.run import harness as official

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--no-python"]
TASKS = [task for task in BENCHMARKS if task != "mmbench_en_dev"]  # `_static` asks the same
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def lm(tiny):
    """One model per checkpoint; tests may change pruner and batch size."""
    from llava_hivtp.lmms import LlavaHIVTP

    made = {}

    def get(anyres=False, mistral=False, pruner="none", batch_size=1, **arguments):
        from llava_hivtp import build_pruner

        key = (anyres, mistral)
        if key not in made:
            made[key] = LlavaHIVTP(str(tiny(*key)), device_map="cpu")
        made[key].model.pruner = build_pruner(pruner, **arguments)
        made[key].batch_size = batch_size
        return made[key]

    return get


@pytest.fixture(scope="module")
def instances(drawn):
    """The first requests of a task, with the documents they read."""
    made = {}

    def get(lm, task, count=2):
        if task not in made:
            made[task] = official.load_task(task, drawn)
        return official.requests(lm, made[task], count)

    return get


class Recorder:
    """A stock LLaVA that notes what it is asked to generate from."""

    def __init__(self, model):
        self.stock, self.calls = model, []

    def __getattr__(self, name):
        return getattr(self.stock, name)

    def generate(self, ids, images=None, **options):
        self.calls.append((ids.tolist(), images))
        return self.stock.generate(ids, images=images, **options)


class InFloat32:
    """torch for lmms-eval's wrapper, whose half precision no CPU computes exactly."""

    float16 = torch.float32

    def __getattr__(self, name):
        return getattr(torch, name)


def official_wrapper(lm, monkeypatch, template):
    """lmms-eval's `llava` on the same weights under LLaVA's own code."""
    from lmms_eval.models.simple import llava as module

    from llava_hivtp import detach

    monkeypatch.setattr(module, "torch", InFloat32())
    wrapper = module.Llava.__new__(module.Llava)
    super(module.Llava, wrapper).__init__()
    wrapper._model = Recorder(detach(lm.model) or lm.model)
    wrapper._tokenizer, wrapper._image_processor = lm.tokenizer, lm.image_processor
    wrapper._config, wrapper._device = lm.model.config, torch.device("cpu")
    wrapper.batch_size_per_gpu, wrapper.conv_template, wrapper.use_cache = 1, template, True
    wrapper.task_dict = lm.task_dict
    return wrapper


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("anyres", "mistral"), [(False, False), (True, True)])
def test_pruning_nothing_equals_the_wrapper_of_lmms_eval(
    lm, instances, monkeypatch, task, anyres, mistral
):
    from llava_hivtp import attach

    ours = lm(anyres, mistral)
    asked = instances(ours, task)
    stock_generate, calls = ours.model.generate, []

    def generate(ids, images=None, **options):
        calls.append((ids.tolist(), images))
        return stock_generate(ids, images=images, **options)

    monkeypatch.setattr(ours.model, "generate", generate, raising=False)
    answers = [result.text for result in ours.generate_until(asked)]
    monkeypatch.undo()
    theirs = official_wrapper(ours, monkeypatch, "mistral_instruct" if mistral else "vicuna_v1")
    try:
        expected = theirs.generate_until(copy.deepcopy(asked))
    finally:
        attach(ours.model)
    assert answers == expected
    assert any(answers)
    for (ids, pixels), (their_ids, their_pixels) in zip(calls, theirs.model.calls, strict=True):
        assert ids == their_ids
        assert len(pixels) == len(their_pixels) == 1
        assert torch.equal(pixels[0], their_pixels[0])


IMAGES = {  # that the drawn questions of a set are about, where it is not one each
    "mme": 20, "mmbench_en_dev_static": 10, "mmbench_cn_dev": 10, "mmbench_cn_dev_static": 10,
    "vqav2_val": 20, "seedbench": 20, "refcoco_bbox_rec_testA": 10, "refcoco_bbox_rec_testB": 10,
}  # fmt: skip


@pytest.fixture
def scored(lm, drawn, monkeypatch):
    """A benchmark's score and samples under lmms-eval's own task, given its answers."""
    from llava_hivtp.answer import Answer

    def get(task, answer):
        model, loaded = lm(), official.load_task(task, drawn)
        documents = loaded.test_docs()
        benchmark = BENCHMARKS[task]

        def respond(batch):
            golds = [(i.args[3], benchmark.gold(documents[i.args[3]])) for i in batch]
            return [Answer(answer(number, gold), 1) for number, gold in golds]

        monkeypatch.setattr(model, "ready", lambda i, requests: requests[i])
        monkeypatch.setattr(model, "_prepare_all", lambda batch: batch)
        monkeypatch.setattr(model, "_answer_all", respond)
        results = official.evaluate(model, loaded, None)
        samples = official.samples(results, task, model.answers)
        assert len(samples) == len(documents)
        score = official.metrics(results, task)[benchmark.metric] * benchmark.scale
        return benchmark, score, samples

    return get


@pytest.mark.parametrize("task", TASKS)
def test_gold_answers_score_full_marks(scored, task):
    """Every official task end to end on the drawn data."""
    benchmark, score, samples = scored(task, lambda number, gold: gold)
    # 200 points in each of the five categories drawn; points of 1000 for the 40 texts drawn
    assert score == pytest.approx({"mme": 1000, "ocrbench": 4}.get(task, 100))
    assert benchmark.shown(score, len(samples)) == pytest.approx(1000 if task == "mme" else 100)
    assert len({sample.group for sample in samples}) == IMAGES.get(task, len(samples))


@pytest.mark.parametrize("task", TASKS)
def test_samples_add_up_to_the_score(scored, task):
    """The first answers wrong: intervals and tests are about the score that is printed."""
    from eval.results import stats

    wrong = {"A": "B", "B": "A", "C": "D", "D": "C", "Yes": "No", "No": "Yes"}
    benchmark, score, samples = scored(
        task, lambda number, gold: gold if number > 12 else wrong.get(gold, "nothing")
    )
    groups = stats.group(benchmark, samples)
    assert stats.score(groups) == pytest.approx(benchmark.shown(score, len(samples)))
    assert 0 < stats.score(groups) < 100 * benchmark.most * len(set(groups.strata))


def test_a_batch_answers_as_one_by_one(lm, instances):
    singly = lm(True, True, "hivtp", r=2, k=25, c=2, layers="2+3")
    asked = [*instances(singly, "pope", 5)]
    before = copy.deepcopy([instance.args[1] for instance in asked])
    one_by_one, alone = singly.generate_until(asked), dict(singly.answers)
    together = lm(True, True, "hivtp", batch_size=4, r=2, k=25, c=2, layers="2+3")
    assert [r.text for r in together.generate_until(asked)] == [r.text for r in one_by_one]
    assert together.answers == alone
    assert [instance.args[1] for instance in asked] == before
    assert all(0 < a.patches < a.total and a.newlines > 0 for a in alone.values())


def test_the_control_chooses_by_the_question_of_another_document(lm, instances):
    """Half of the requests further on, whatever the batch and whatever was answered before."""
    arguments = {"pruner": "cdpruner", "keep": 0.25}
    model = lm(**arguments)
    asked = [*instances(model, "pope", 6)]

    def chosen():
        heard = []
        select = type(model.model.pruner).select

        def listening(pruner, features):
            heard.append(features.question)
            return select(pruner, features)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(model.model.pruner), "select", listening)
            model.generate_until(asked)
        order = sorted(range(len(asked)), key=lambda i: -len(asked[i].args[0]))
        return [
            question for _, question in sorted(zip(order, heard, strict=True), key=lambda at: at[0])
        ]

    own = chosen()
    lm(**arguments, question="other")
    other = chosen()
    assert all(map(torch.equal, other, own[3:] + own[:3]))
    assert not torch.equal(own[0], own[3])
    singly = dict(model.answers)
    lm(**arguments, question="other", batch_size=4).generate_until(asked)
    assert model.answers == singly
    with pytest.raises(ValueError, match="question=other needs questions="):
        model.generate_until(asked[:1])


def request(question, images=0, options=None):
    from llava_hivtp.answer import Request

    pictures = [Image.new("RGB", (60, 40), (40 * i, 200, 90)) for i in range(images)]
    return Request(question, {"max_new_tokens": 8} | (options or {}), tuple(pictures))


def test_requests_with_several_images_and_none_share_a_batch(lm):
    model = lm()
    mixed = [request("one", 1), request("none"), request("two", 2), request("none at all")]
    together = model._answer_all(model._prepare_all(mixed))
    assert together == [model.answer([one])[0] for one in mixed]
    assert [answer.patches for answer in together] == [16, 0, 32, 0]


def test_marks_of_images_must_match_the_images(lm):
    with pytest.raises(ValueError, match="1 marks <image> for 0 images"):
        lm().answer([request("what is <image>?")])


def test_until_ends_an_answer(lm):
    model = lm()
    (free,) = model.answer([request("say", 1, {"max_new_tokens": 30})])
    stop = free.text[2:4]
    (cut, other) = model.answer(
        [request(q, 1, {"max_new_tokens": 30, "until": [stop]}) for q in ("say", "say more")]
    )
    assert cut.text == free.text.partition(stop)[0]
    assert cut.generated < free.generated
    (alone,) = model.answer([request("say more", 1, {"max_new_tokens": 30, "until": [stop]})])
    assert other == alone


def test_an_error_in_a_request_is_raised(lm, instances):
    model = lm()
    (asked,) = instances(model, "pope", 1)
    asked.arguments[1]["max_new_tokens"] = "many"
    with pytest.raises((TypeError, ValueError)):
        model.generate_until([asked])


def test_a_broken_image_names_its_document(lm, instances):
    model = lm()
    (asked,) = instances(model, "pope", 1)
    question, options, _, *rest = asked.args

    def broken(doc):
        raise OSError("image file is truncated")

    asked.arguments = (question, options, broken, *rest)
    with pytest.raises(ValueError, match="pope: document 0 cannot be read: image file is truncat"):
        model.generate_until([asked])


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("liuhaotian/llava-v1.5-7b", {}, "vicuna_v1"),
        ("/disk/llava-v1.6-vicuna-13b/", {}, "vicuna_v1"),
        ("liuhaotian/llava-v1.6-mistral-7b", {}, "mistral_instruct"),
        ("/disk/mine", {"model_type": "llava_mistral"}, "mistral_instruct"),
        ("liuhaotian/llava-v1.6-34b", {}, "chatml_direct"),
        ("llava-llama-2-13b-chat", {}, "llava_llama_2"),
        ("/disk/mine", {"conv_template": "plain"}, "plain"),
    ],
)
def test_the_template_follows_the_checkpoint(name, settings, expected):
    from llava_hivtp.conversation import template_name

    config = SimpleNamespace(**{"model_type": "llava_llama"} | settings)
    assert template_name(name, config) == expected
    assert template_name(name, config, "llava_v0") == "llava_v0"
    with pytest.raises(ValueError, match="unknown conv_template 'vicuna_v9'"):
        template_name(name, config, "vicuna_v9")


@pytest.mark.slow
def test_lmms_eval_finds_the_model_by_entry_point(tiny, drawn, tmp_path):
    """Its command line, with the pruner's arguments in --model_args, on one and two processes."""
    subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    call = [
        *("-m", "lmms_eval", "--model", "llava_hivtp", "--tasks", "pope", "--limit", "4"),
        "--model_args",
        f"pretrained={tiny()},pruner=hivtp,r=2,k=25,c=2,layers=2+3,device_map=cpu",
    ]
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}",
        "ACCELERATE_USE_CPU": "1",
        "LOGURU_LEVEL": "INFO",
    }
    commands = {"one": [sys.executable, *call], "two": [*TORCHRUN, sys.executable, *call]}
    answers = {}
    for name, command in commands.items():
        subprocess.run(
            [*command, "--output_path", tmp_path / name, "--log_samples"],
            cwd=drawn, env=environment, check=True, timeout=1800,
        )  # fmt: skip
        (samples,) = (tmp_path / name).rglob("*samples_pope.jsonl")
        records = [json.loads(line) for line in samples.read_text().splitlines()]
        answers[name] = {record["doc_id"]: record["filtered_resps"] for record in records}
    assert answers["one"] == answers["two"]
    assert len(answers["one"]) == 4


@pytest.mark.parametrize("anyres", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_threads_that_prepare_ahead_change_no_answer(lm, instances, anyres, batch_size):
    model = lm(anyres=anyres, pruner="hivtp", layers="2+3", batch_size=batch_size)
    asked, answers = [*instances(model, "pope", 16)], []
    try:
        for model.workers in (0, 1, 3):
            model.generate_until(asked)
            answers.append(model.answers)
    finally:
        model.workers = 2
    assert answers[0] == answers[1] == answers[2]
    assert [*answers[0]] == [*answers[1]] == [*answers[2]]


def test_a_number_of_threads_is_whole_and_not_negative(tiny):
    from llava_hivtp.lmms import LlavaHIVTP

    with pytest.raises(ValueError, match="workers must be at least 0, got -1"):
        LlavaHIVTP(str(tiny()), device_map="cpu", workers="-1")


def test_how_large_an_image_may_be_is_a_setting(tiny):
    from llava_hivtp.answer import Request
    from llava_hivtp.lmms import LlavaHIVTP

    lm = LlavaHIVTP(str(tiny()), device_map="cpu", max_side="300", max_aspect="2.5")
    for size, said in (((301, 300), "at most 300 a side"), ((300, 100), "may be 2.5 times")):
        request = Request("What?\n", {}, (Image.new("RGB", size),))
        with pytest.raises(ValueError, match=said):
            lm.answer([request])
        with pytest.raises(ValueError, match=said):
            lm._prepare_all([request])
    for wrong in ({"max_side": "wide"}, {"max_aspect": "thin"}, {"max_side": "1.5"}):
        ((name, value),) = wrong.items()
        said = f"{name.removeprefix('max_')} must be .*number from 1, got '{value}'"
        with pytest.raises(ValueError, match=said):
            LlavaHIVTP(str(tiny()), device_map="cpu", **wrong)
