"""The benchmarks, one record each: whatever depends on which benchmark it is stands here.

To add one, add its record; `eval/nano/further_sets.py` draws a stand-in for its data, from which
the tests show that the official task gives its gold answers full marks.
"""

from __future__ import annotations

import re
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


def _mmbench(task: str, measures: str, language: str = "en") -> Benchmark:
    """A question is asked in several turns of its options; all of them must be right."""
    column, title = ("mmb", "MMBench") if language == "en" else ("mmb_cn", "MMBench-CN")
    return Benchmark(
        task=task,
        column=column,
        title=title,
        metric="gpt_eval_score,none",
        scale=1,
        measures=measures,
        data=(Part("lmms-lab-encoder/MMBench", "dev", language, 4329),),
        gold=lambda doc: doc["answer"],
        group=lambda doc: doc["index"] % 1_000_000,
        score=_mmbench_score,
        tally=all_right,
        judge=measures == "judged",
    )


def _seed_score(sample: Sample) -> float:
    found = sample["seed_image"]
    return found["pred"].strip().lower() == found["answer"].strip().lower()


def _mmmu_score(sample: Sample) -> float:
    from lmms_eval.tasks.mmmu.utils import evaluate_mmmu

    _, found = evaluate_mmmu([sample["mmmu_acc"]])
    return found["acc"]


def _refcoco_score(sample: Sample) -> float:
    from lmms_eval.tasks.refcoco.utils_rec import compute_accuracy

    found = sample["refcoco_ACC@0.5"]
    return compute_accuracy(found["bbox"], found["pred"], 0.5)


def _refcoco(split: str, expressions: int) -> Benchmark:
    """Boxes for expressions, as LLaVA writes them: [x1, y1, x2, y2], shares of the image's sides.

    testA shows people, testB other things. Their numbers of objects are those of the official
    splits (1975, 1810); lmms-eval's `val` has 8811 where the official one has 3811, so it is none
    of these records. No package but lmms-eval is needed.
    """
    return Benchmark(
        task=f"refcoco_bbox_rec_{split}",
        column=f"refcoco_{split[-1].lower()}",
        title=f"RefCOCO {split}",
        metric="refcoco_ACC@0.5,none",
        scale=100,
        measures="boxes at IoU 0.5",
        data=(Part("lmms-lab-encoder/RefCOCO", split, documents=expressions),),
        gold=lambda doc: f"[{', '.join(f'{side:.4f}' for side in doc['bbox'])}]",
        # COCO_train2014_000000581857_16.jpg: the object's number follows the image's
        group=lambda doc: re.search(r"\d{12}|$", doc["file_name"])[0] or None,
        score=_refcoco_score,
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
    Benchmark(
        task="vqav2_val",
        column="vqav2",
        title="VQAv2",
        metric="exact_match,none",
        scale=100,
        measures="validation",
        data=(Part("lmms-lab-encoder/VQAv2", "validation", documents=214354),),
        gold=lambda doc: doc["multiple_choice_answer"],
        group=lambda doc: doc["image_id"],
        printed_on="test-dev",
        stands_alone=True,
    ),
    Benchmark(
        task="vizwiz_vqa_val",
        column="vizwiz",
        title="VizWiz",
        metric="exact_match,none",
        scale=100,
        measures="validation",
        data=(Part("lmms-lab-encoder/VizWiz-VQA", "val", documents=4319),),
        gold=lambda doc: doc["answers"][0],
        printed_on="test",
    ),
    # The task also asks about films, eight frames each, which the score of the images leaves out.
    Benchmark(
        task="seedbench",
        column="seed",
        title="SEED-Bench",
        metric="seed_image,none",
        scale=100,
        measures="images",
        data=(Part("lmms-lab-encoder/SEED-Bench", "test", documents=14233),),
        gold=lambda doc: doc["answer"],
        group=lambda doc: doc["data_id"],
        score=_seed_score,
        only=("data_type", "image"),
    ),
    _mmbench("mmbench_cn_dev", "judged", "cn"),
    _mmbench("mmbench_cn_dev_static", "static", "cn"),
    Benchmark(
        task="mmmu_val",
        column="mmmu",
        title="MMMU",
        metric="mmmu_acc,none",
        scale=100,
        measures="validation",
        data=(Part("lmms-lab-encoder/MMMU", "validation", documents=900),),
        gold=lambda doc: doc["answer"],
        score=_mmmu_score,
    ),
    _refcoco("testA", 5657),
    _refcoco("testB", 5095),
)
BENCHMARKS = {benchmark.task: benchmark for benchmark in _RECORDS}
