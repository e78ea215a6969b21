"""Confidence intervals cover what they say, paired tests find what is there and nothing else."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats as reference

from eval.benchmarks.records import BENCHMARKS
from eval.results import stats
from eval.results.records import Sample
from eval.results.stats import interval, score


def samples(scores, groups=None, answers=None, **more):
    groups = range(len(scores)) if groups is None else groups
    answers = ["x"] * len(scores) if answers is None else answers
    return [
        Sample(doc_id=i, score=s, group=g, answer=a, **{k: v[i] for k, v in more.items()})
        for i, (s, g, a) in enumerate(zip(scores, groups, answers, strict=True))
    ]


def group(task, drawn):
    return stats.group(BENCHMARKS[task], drawn)


def compare(task, row, unpruned):
    return stats.compare(group(task, row), group(task, unpruned))


def mme(rights, categories):
    """Two questions per image; one (a, b) of right or wrong per image."""
    flat = [float(r) for pair in rights for r in pair]
    images = [i for i in range(len(rights)) for _ in range(2)]
    return samples(flat, images, stratum=[c for c in categories for _ in range(2)])


def covers(groups, truth):
    low, high = interval(groups)
    return low <= truth <= high


def test_a_plain_mean_has_the_textbook_interval():
    values = np.random.default_rng(0).random(200)
    groups = group("gqa", samples(values))
    # Wilson's for so many questions, right or wrong, as have this variance
    share, z = values.mean(), reference.t.ppf(0.975, 199)
    asked = share * (1 - share) / (values.var(ddof=1) / 200)
    middle = (share + z**2 / (2 * asked)) / (1 + z**2 / asked)
    half = z / (1 + z**2 / asked) * np.sqrt(share * (1 - share) / asked + z**2 / (4 * asked**2))
    assert score(groups) == pytest.approx(100 * values.mean())
    assert interval(groups) == pytest.approx((100 * (middle - half), 100 * (middle + half)))


def test_right_and_wrong_answers_have_wilsons_interval():
    """Of scipy, but for 199 instead of 200 (the variance is unbiased) and t instead of z."""
    low, high = interval(group("gqa", samples([1.0] * 190 + [0.0] * 10)))
    known = reference.binomtest(190, 200).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((100 * known.low, 100 * known.high), abs=0.1)


@pytest.mark.parametrize("wrong", [1, 2, 9])
@pytest.mark.parametrize("task", ["pope", "mme"])
def test_an_interval_lies_inside_the_scale(task, wrong):
    right = [1.0] * (40 - wrong) + [0.0] * wrong
    for scores in (right, [1 - s for s in right]):
        pairs = [(s, s) for s in scores]
        drawn = samples(scores) if task == "pope" else mme(pairs, ["color", "OCR"] * 20)
        groups = group(task, drawn)
        low, high = interval(groups)
        assert 0 <= low < score(groups) < high <= groups.top


def test_holm_corrects_as_printed():
    """Holm 1979: the smallest times m, the next times m - 1, never falling, at most 1."""
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.6, 0.7]) == [1.0, 1.0]
    assert stats.holm([]) == []


def test_mme_gives_200_per_category_and_counts_perception_only():
    rights = [(1, 1), (1, 0), (0, 0), (1, 1), (0, 0)]
    groups = group("mme", mme(rights, ["color", "color", "color", "OCR", "code_reasoning"]))
    # color: (200 + 50 + 0) / 3, OCR: 200, code_reasoning: not perception
    assert score(groups) == pytest.approx(250 / 3 + 200)


def test_mmbench_asks_for_every_rotation_of_a_question():
    rotations = samples([1, 1, 1, 0], groups=[7, 7, 8, 8])
    assert score(group("mmbench_en_dev_static", rotations)) == 50


def test_the_interval_covers_the_truth_when_questions_share_an_image():
    rng = np.random.default_rng(1)
    hits = naive_hits = 0
    runs = 400
    for _ in range(runs):
        sizes = rng.integers(1, 9, 120)
        images = np.repeat(np.arange(120), sizes)
        skill = rng.choice([0.2, 1.0], 120)[images]  # an image is easy or hard as a whole
        drawn = samples((rng.random(len(images)) < skill).astype(float), images)
        clustered = group("pope", drawn)
        naive = group("pope", samples([s.score for s in drawn]))
        hits += covers(clustered, 60)
        naive_hits += covers(naive, 60)
    assert 0.92 <= hits / runs <= 0.98
    assert naive_hits / runs < 0.85  # why groups are needed


def test_the_interval_of_mme_covers_the_truth():
    rng = np.random.default_rng(2)
    rates = {"color": 0.9, "OCR": 0.6, "scene": 0.75}
    truth = sum(100 * (p + p * p) for p in rates.values())
    categories = [c for c, n in zip(rates, (30, 20, 100), strict=True) for _ in range(n)]
    hits = 0
    for _ in range(400):
        rights = [rng.random(2) < rates[c] for c in categories]
        groups = group("mme", mme(rights, categories))
        hits += covers(groups, truth)
    assert 0.92 <= hits / 400 <= 0.98


def test_no_interval_from_a_single_group_or_from_groups_all_alike():
    assert interval(group("gqa", samples([1.0, 1.0, 1.0]))) is None
    assert interval(group("gqa", samples([1.0]))) is None
    assert interval(group("gqa", [])) is None


def test_single_answers_are_tested_by_mcnemar():
    before = [1.0] * 60 + [0.0] * 40
    after = [0.0] * 15 + [1.0] * 45 + [1.0] * 5 + [0.0] * 35  # 15 lost, 5 won
    paired = compare("ai2d", samples(after), samples(before))
    assert paired.difference == pytest.approx(-10)
    assert paired.p_value == pytest.approx(reference.binomtest(5, 20).pvalue)


def test_few_groups_are_tested_exactly():
    before, after = [0.0, 0.3, 0.6, 0.0, 1.0], [0.3, 1.0, 1.0, 0.6, 1.0]
    paired = compare("textvqa_val", samples(after), samples(before))
    # four changes, all up: 2 of the 16 sign patterns are as extreme
    assert paired.p_value == pytest.approx(2 / 16)


def test_many_groups_are_tested_as_a_permutation_of_all_signs_would():
    rng = np.random.default_rng(4)
    before, after = rng.random((2, 60, 3)).round(1)
    after[:, 0] += 0.15
    images = np.repeat(np.arange(60), 3)
    found = compare("gqa", samples(after.ravel(), images), samples(before.ravel(), images))
    expected = reference.permutation_test(
        (after.sum(1) - before.sum(1),), np.sum, permutation_type="samples", vectorized=True, rng=0
    )
    assert 0.02 < expected.pvalue < 0.9
    assert found.p_value == pytest.approx(expected.pvalue, abs=0.02)


def test_grouped_answers_are_no_independent_evidence():
    images = np.repeat(np.arange(5), 20)
    before, after = [0.0] * 100, [1.0] * 60 + [0.0] * 40  # three images flip as a whole
    grouped = compare("pope", samples(after, images), samples(before, images))
    alone = compare("pope", samples(after), samples(before))
    assert alone.p_value < 1e-6
    assert grouped.p_value == pytest.approx(0.25)


@pytest.mark.parametrize("task", ["pope", "mme"])
def test_a_test_of_nothing_rejects_in_five_percent(task):
    rng = np.random.default_rng(3)
    rejected = 0
    for _ in range(120):
        make = (
            (lambda: mme(rng.random((60, 2)) < 0.7, ["color", "OCR"] * 30))
            if task == "mme"
            else (lambda: samples((rng.random(80) < 0.7).astype(float), np.arange(80) // 4))
        )
        rejected += compare(task, make(), make()).p_value < 0.05
    assert rejected <= 14  # 6 are expected


def test_equal_rows_differ_by_nothing():
    drawn = samples([1.0, 0.0, 1.0], answers=["a", "b", "c"])
    paired = compare("gqa", drawn, drawn)
    assert (paired.difference, paired.p_value, paired.same_answers) == (0, 1, 1)


def test_answers_are_compared_by_document_not_by_order():
    first = samples([1.0, 0.0, 1.0, 1.0], answers=["a", "b", "c", "d"])
    second = [replace(first[-1], answer="other"), *reversed(first[:-1])]
    assert compare("gqa", first, second).same_answers == 0.75


def test_other_documents_are_not_compared():
    assert compare("gqa", samples([1.0, 0.0]), samples([1.0, 0.0, 1.0])) is None
    assert compare("gqa", [], []) is None
