"""What `mmbench_cn_dev_static.yaml` names: questions and samples are lmms-eval's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmms_eval.tasks.mmbench.cn_utils import mmbench_doc_to_text as text
from lmms_eval.tasks.mmbench.cn_utils import mmbench_doc_to_visual as visual
from lmms_eval.tasks.mmbench.cn_utils import mmbench_process_results
from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

__all__ = ["process", "score", "text", "visual"]


def process(doc: Mapping[str, Any], results: list[str]) -> dict[str, Any]:
    """The sample, without lmms-eval's file for a leaderboard."""
    return {"gpt_eval_score": mmbench_process_results(doc, results)["gpt_eval_score"]}


def score(results: list[dict[str, Any]], args: Any) -> float:
    """Percent of questions right in all their turns; what no rule reads is wrong."""
    return 100 * MMBench_Evaluator().eval_result(results, eval_method="static")[0]
