"""The benchmarks, one record each: whatever depends on which benchmark it is stands here.

To add one, add its record; `eval/nano/datasets.py` draws a stand-in for its data, from which the
tests show that the official task gives its gold answers full marks.
"""

from __future__ import annotations

from collections.abc import Sequence

from eval.benchmarks.record import Benchmark, Part, Sample, all_right


def _image_points(scores: Sequence[float]) -> tuple[float, float]:
    """MME's accuracy plus accuracy+ of one image: its share right, and 1 more if all are."""
    return sum(scores) / len(scores) + (min(scores) == 1), 1


def _mme_score(sample: Sample) -> float:
    """A question belongs to perception or to cognition."""
    names = ("mme_perception_score", "mme_cognition_score")
    (found,) = (sample[name] for name in names if name in sample)
    return found["score"]


def _mmbench_score(sample: Sample) -> float:
    """MMBench's own rule on one turn of a question, without a judge."""
    import pandas as pd
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    row = {k if k in "ABCD" else k.lower(): v for k, v in sample["gpt_eval_score"].items()}
    return MMBench_Evaluator().eval_sub_data(
        pd.DataFrame([row]), {row["index"]: row["answer"]}, static_only=True
    )


def _mmbench(task: str, measures: str) -> Benchmark:
    """A question is asked in several turns of its options; all of them must be right."""
    return Benchmark(
        task=task,
        column="mmb",
        title="MMBench",
        metric="gpt_eval_score,none",
        scale=1,
        measures=measures,
        data=(Part("lmms-lab-encoder/MMBench", "dev", "en", 4329),),
        gold=lambda doc: doc["answer"],
        group=lambda doc: doc["index"] % 1_000_000,
        score=_mmbench_score,
        tally=all_right,
    )


_RECORDS = (
    Benchmark(
        task="mme",
        column="mme",
        title="MME",
        metric="mme_perception_score,none",
        scale=1,
        measures="perception",
        data=(Part("lmms-lab-encoder/MME", "test", documents=2374),),
        gold=lambda doc: doc["answer"],
        group=lambda doc: doc["question_id"],
        stratum=lambda doc: doc["category"],
        score=_mme_score,
        tally=_image_points,
        strata=10,
        uncounted=frozenset(
            {"commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"}
        ),
        together=2,
        stands_alone=True,
    ),
    Benchmark(
        task="pope",
        column="pope",
        title="POPE",
        metric="pope_accuracy,none",
        scale=100,
        measures="accuracy",
        data=(Part("lmms-lab-encoder/POPE", "test", documents=9000),),
        gold=lambda doc: doc["answer"],
        group=lambda doc: doc.get("image_source"),
        stands_alone=True,
    ),
    Benchmark(
        task="textvqa_val",
        column="textvqa",
        title="TextVQA",
        metric="exact_match,none",
        scale=100,
        measures="no OCR tokens",
        data=(Part("lmms-lab-encoder/textvqa", "validation", documents=5000),),
        gold=lambda doc: doc["answers"][0],
        group=lambda doc: doc.get("image_id"),
        stands_alone=True,
    ),
    # Answers that no rule can read: a remote model is asked about them, or they are wrong.
    _mmbench("mmbench_en_dev", "judged"),
    _mmbench("mmbench_en_dev_static", "static"),
    Benchmark(
        task="scienceqa_img",
        column="sqa",
        title="ScienceQA",
        metric="exact_match,none",
        scale=100,
        measures="image subset",
        data=(Part("lmms-lab-encoder/ScienceQA", "test", "ScienceQA-IMG", 2017),),
        gold=lambda doc: "ABCDEFGH"[doc["answer"]],
    ),
    Benchmark(
        task="ocrbench",
        column="ocr",
        title="OCRBench",
        metric="ocrbench_accuracy,none",
        scale=100,
        measures="points of 1000",
        data=(Part("echo840/OCRBench", "test", documents=1000),),
        gold=lambda doc: doc["answer"][0],
        over=1000,
        stands_alone=True,
    ),
    Benchmark(
        task="gqa",
        column="gqa",
        title="GQA",
        metric="exact_match,none",
        scale=100,
        measures="testdev balanced",
        data=(
            Part("lmms-lab-encoder/GQA", "testdev", "testdev_balanced_instructions", 12578),
            Part("lmms-lab-encoder/GQA", "testdev", "testdev_balanced_images"),
        ),
        gold=lambda doc: doc["answer"],
        group=lambda doc: doc.get("imageId"),
    ),
    Benchmark(
        task="ai2d",
        column="ai2d",
        title="AI2D",
        metric="exact_match,flexible-extract",
        scale=100,
        measures="flexible extract",
        data=(Part("lmms-lab-encoder/ai2d", "test", documents=3088),),
        gold=lambda doc: f"{'ABCDEFGH'[int(doc['answer'])]}.",
    ),
)
BENCHMARKS = {benchmark.task: benchmark for benchmark in _RECORDS}
