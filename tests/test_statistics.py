"""Intervals, tests and sentences of a comparison, on scores whose truth is known."""

from __future__ import annotations

import importlib.util
from fractions import Fraction
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from lab.analysis import metrics
from lab.analysis.expectations import Expectation, judge
from lab.analysis.pairs import HIGHER, LOWER, pairs
from lab.analysis.statistics import (
    ALPHA,
    BOOTSTRAP_FROM,
    effect_size,
    estimate,
    fewest_seeds,
    holm,
    p_of,
    paired_interval,
    paired_p,
    seeds_needed,
    smallest_p,
)


@pytest.fixture(scope="module")
def simulate():
    spec = importlib.util.spec_from_file_location("simulate", Path(__file__).parents[1] / "scripts" / "simulate_statistics.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ----------------------------------------------------------------------- one model


def test_the_interval_of_a_few_seeds_is_students():
    assert estimate([3.0]) == (1, 3.0, None, None)
    n, mean, low, high = estimate([0.8, 0.9, 1.0])
    assert (n, mean) == (3, pytest.approx(0.9))
    assert (low, high) == (pytest.approx(0.9 - 0.24841377), pytest.approx(0.9 + 0.24841377))  # 4.302653 * 0.1 / sqrt(3)
    assert estimate([1.0, 1.0]) == (2, 1.0, 1.0, 1.0) and estimate([0.7] * 30)[2:] == (0.7, 0.7)


def test_the_interval_of_many_seeds_is_the_bootstraps():
    values = list(np.random.default_rng(1).exponential(size=BOOTSTRAP_FROM))
    want = stats.bootstrap((values,), np.mean, n_resamples=9_999, method="BCa", rng=np.random.default_rng(0)).confidence_interval
    assert estimate(values)[2:] == pytest.approx((want.low, want.high))
    n, mean, low, high = estimate(values[1:])
    assert high - mean == pytest.approx(mean - low) and n == BOOTSTRAP_FROM - 1  # Student's is symmetric, that of skewed values is not
    assert want.high - np.mean(values) > 1.1 * (np.mean(values) - want.low)


def test_the_rule_of_the_intervals_is_the_better_one(simulate):
    few, many = simulate.coverage("normal", 8, 1000), simulate.coverage("normal", BOOTSTRAP_FROM, 1000)
    assert few["t"] > 0.93 > 0.92 > few["BCa"] and many["BCa"] > 0.91


# ----------------------------------------------------------------------- two models


@pytest.mark.parametrize("n", [2, 5, 8])
def test_p_is_that_of_all_signs(n):
    a, b = np.random.default_rng(n).normal(size=(2, n))
    want = stats.permutation_test((a, b), lambda x, y: np.mean(x - y), permutation_type="samples", vectorized=False).pvalue
    assert paired_p(a - b) == pytest.approx(want) == p_of(tuple(a - b))
    assert paired_p(np.stack([a - b, b - a, np.full(n, 0.1)])) == pytest.approx([want, want, smallest_p(n)])


@pytest.mark.parametrize("rows", [10, 300, 512])
def test_sums_that_are_equal_but_for_rounding_are_equal(rows):
    """Accuracies come in steps, so that many sums of differences are the same number."""
    a, b = ([Fraction(k, rows) for k in row] for row in ([8, 5, 6, 8, 6, 6, 9], [5, 9, 9, 5, 7, 6, 7]))
    exact = [x - y for x, y in zip(a, b, strict=True)]
    sums = [abs(sum(sign * d for sign, d in zip(signs, exact, strict=True))) for signs in product((1, -1), repeat=7)]
    want = sum(total >= abs(sum(exact)) for total in sums) / len(sums)
    assert p_of(tuple(float(x) - float(y) for x, y in zip(a, b, strict=True))) == want
    assert p_of((0.0, 0.0, 0.0)) == 1


@pytest.mark.parametrize("rows", [10, 70, 100])
def test_the_interval_of_scores_in_steps_agrees_with_the_test(rows):
    """Accuracies have many sums that are zero but for their rounding."""
    for n in (7, 9, 12):
        for a, b in np.random.default_rng(n).integers(0, rows + 1, (300, 2, n)) / rows:
            _, _, low, high = paired_interval(a - b)
            assert (low <= 0 <= high) == (p_of(tuple(a - b)) > ALPHA), (a, b)


@pytest.mark.parametrize("n", [6, 8, 13, 15, 17, 19])
def test_the_interval_of_a_difference_is_what_the_test_does_not_reject(n):
    """At its ends p crosses ALPHA, so that an interval without zero and a significant p are one and the same."""
    for values in np.random.default_rng(n).exponential(size=(3, n)) - 0.3:
        _, mean, low, high = paired_interval(values)
        assert low < mean < high and mean == pytest.approx(values.mean())
        step = 1e-6 * (high - low)
        assert p_of(tuple(values - (low - step))) <= ALPHA < p_of(tuple(values - (low + step)))
        assert p_of(tuple(values - (high + step))) <= ALPHA < p_of(tuple(values - (high - step)))


def test_the_interval_of_a_difference_holds_the_truth_as_often_as_promised():
    rng = np.random.default_rng(0)
    held = {}
    for name, draws in {"normal": rng.normal(size=(2000, 8)), "heavy tails": rng.standard_t(2, (2000, 8))}.items():
        found = [paired_interval(row) for row in draws]
        held[name] = np.mean([each.low <= 0 <= each.high for each in found])
    assert all(0.94 < share < 0.965 for share in held.values()), held
    assert paired_interval([0.1, 0.2, 0.3]) == estimate([0.1, 0.2, 0.3])  # three have no such interval
    assert paired_interval([0.3] * 8) == (8, 0.3, 0.3, 0.3)


def test_the_smallest_p():
    assert (smallest_p(5), smallest_p(8)) == (0.0625, 0.0078125) and smallest_p(40) == 0.0002
    assert [fewest_seeds(tests) for tests in (1, 3, 28, 250, 251)] == [6, 7, 11, 14, None] and seeds_needed(2.0, 251) is None
    assert p_of((1.0,) * 8) == 0.0078125 and p_of((1.0,) * 14) == smallest_p(14) == 0.0002


def test_holm_and_the_effect_size():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02]) and holm([0.9, 0.8]) == [1.0, 1.0]
    assert effect_size([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(3 / 2.5**0.5 * 0.8)  # 1 - 3 / (4 * 5 - 5)
    assert effect_size([0.1, 0.3]) is None and effect_size([0.3] * 5) is None


@pytest.mark.parametrize(("n", "names"), [(8, 2), (10, 2), (8, 3)])
def test_false_alarms(simulate, n, names):
    """Names for the same model: at most 65 in 1,000; and not so few that nothing could be found."""
    assert 20 <= simulate.found(n, names) <= 65


def test_a_planted_difference_is_found_at_the_promised_power(simulate):
    needed = {(effect, tests): seeds_needed(effect, tests) for effect, tests in ((2.0, 1), (1.25, 1), (1.5, 3), (1.0, 1))}
    assert list(needed.values()) == [6, 8, 9, 11] and seeds_needed(0.05) is None
    for (effect, tests), n in needed.items():
        assert simulate.power(effect, tests, n) >= 0.8, (effect, tests)
        assert n == fewest_seeds(tests) or simulate.power(effect, tests, n - 2) < 0.8, (effect, tests)  # nor far more than needed


# ----------------------------------------------------------------------- sentences


def texts(differences, metric="test/exact_match", seeds=None, third=None) -> list[str]:
    """differences: a - b of each seed, None where b has none. third: whether there is a model more, the same as a."""
    a = {seed: 0.5 for seed in range(len(differences))}
    b = {seed: 0.5 - d for seed, d in enumerate(differences) if d is not None}
    scores = {"a": a, "b": b} | ({"c": a} if third else {})
    return [line["text"] for line in pairs(scores, list(combinations(scores, 2)), metric, 16, seeds or len(differences))]


SIX = (0.1, 0.2, 0.3, 0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    ("differences", "metric", "text"),
    [
        (SIX, "test/exact_match", "a is better than b by 0.200 [0.100, 0.300]"),
        ([-d for d in SIX], "test/exact_match", "b is better than a by 0.200 [0.100, 0.300]"),
        (SIX, "test/ce_loss", "b is better than a by 0.200 [0.100, 0.300]"),
        ([-d for d in SIX], "val/ce_loss", "a is better than b by 0.200 [0.100, 0.300]"),
        (SIX, "test/mean_sync_order", "a is higher than b by 0.200 [0.100, 0.300]"),
        ([-d for d in SIX], "test/sync", "b is higher than a by 0.200 [0.100, 0.300]"),
        ((*SIX, None, None), "test/exact_match", "a and b: cannot tell, for of 8 seeds 6 are paired"),
        ((0.1, 0.2, -0.1, 0.1, -0.05, 0.2), "test/exact_match", "a and b: not distinguishable with 6 seeds; about 35 would be needed"),
        ((0.1, -0.1, 0.1, -0.1, 0.1, -0.09), "test/exact_match",
         "a and b: not distinguishable with 6 seeds; more than 1,000 would be needed"),
        ((0.0,) * 6, "test/exact_match", "a and b: not distinguishable with 6 seeds; they differ in none"),
        ((0.1, 0.2, 0.1, 0.2, 0.1), "test/exact_match",
         "a and b: cannot be significant with 5 seeds (the smallest two-sided p is 0.0625); it takes 6"),
        ((0.1, None, None), "test/exact_match",
         "a and b: cannot tell, for of 3 seeds 1 is paired"),
        ((0.1,), "test/exact_match", "a and b: cannot be significant with 1 seed, which has no spread"),
    ],
)  # fmt: skip
def test_a_sentence(differences, metric, text):
    assert texts(differences, metric) == [text]


def test_a_sentence_is_about_one_of_several_pairs():
    """Of three pairs six seeds are too few; seven are not, and one of them is enough where it is the last to be corrected."""
    of_three = "(the smallest two-sided p is 0.0312, 0.0938 for one of 3 pairs); it takes 7"
    assert texts(SIX, third=True)[0] == f"a and b: cannot be significant with 6 seeds {of_three}"
    seven = texts((*SIX, 0.2), third=True)
    assert seven[0].startswith("a is better than b by 0.200 [") and seven[2].startswith("c is better than b")
    assert seven[1] == "a and c: not distinguishable with 7 seeds; they differ in none"
    assert texts((None,) * 3) == []


def test_pairs_are_those_that_are_planned_and_all_of_them_count():
    """What has no score yet, or lost its runs, makes no other pair more significant."""
    a = {seed: 0.5 + d for seed, d in enumerate((*SIX, 0.2))}
    scores = {"a": a, "b": dict.fromkeys(range(7), 0.5), "c": {}}
    (alone,) = pairs(scores, [("a", "b")], "test/exact_match", 16, 7)
    (of_three,) = pairs(scores, [("a", "b"), ("a", "c"), ("b", "c")], "test/exact_match", 16, 7)
    assert alone["p_holm"] == alone["p"] == of_three["p"] == 2 / 2**7 and of_three["p_holm"] == 3 * of_three["p"]
    lost = scores | {"c": {seed: 0.5 for seed in range(6)}}  # of the seventh, which may have been its bad one
    both = pairs(lost, [("a", "b"), ("a", "c")], "test/exact_match", 16, 7)
    assert [line["p_holm"] for line in both] == [2 * both[0]["p"], None] and "cannot tell" in both[1]["text"]
    (turned,) = pairs(scores, [("b", "a")], "test/exact_match", 16, 7)
    assert turned["difference"] == -alone["difference"] and (turned["low"], turned["high"]) == (-alone["high"], -alone["low"])


def test_of_each_score_it_is_known_what_is_better():
    assert {*metrics.SCORES, "ce_loss", "exact_match_free", "loss"} == {*HIGHER, *LOWER} and not {*HIGHER} & {*LOWER}


# ----------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("bounds", "scores", "verdict", "why"),
    [
        ({"at_least": 0.9}, {"a": {1: 0.95, 2: 0.96, 3: 0.95}}, "held", None),
        ({"at_least": 0.9}, {"a": {1: 0.5, 2: 0.51, 3: 0.5}}, "not held", None),
        ({"at_least": 0.9}, {"a": {1: 0.95, 2: 0.80, 3: 0.99}}, "cannot tell", "the interval is on both sides of the bound"),
        ({"at_least": 0.9}, {"a": {1: 0.95}}, "cannot tell", "one seed gives no interval"),
        ({"at_least": 0.9}, {"a": {1: 0.95, 2: 0.96, 3: "failed: NaN"}}, "cannot tell", "a: seed 3: failed: NaN"),  # though they would do
        ({"at_least": 0.9}, {"a": {1: "killed", 2: 0.9, 3: "killed"}}, "cannot tell", "a: seeds 1, 3: killed"),
        ({"at_least": 0.9}, {"a": {1: "not scored", 2: "not scored"}}, "cannot tell", "a: not scored"),
        ({"at_most": 0.2}, {"a": {1: 0.1, 2: 0.11}}, "held", None),
        ({"at_least": 0.1, "at_most": 0.2}, {"a": {1: 0.3, 2: 0.3}}, "not held", None),
        ({"at_least": 0.3, "over": "b"}, {"a": {1: 0.9, 2: 0.5}, "b": {1: 0.5, 2: 0.1}}, "held", None),  # by seed
        ({"at_least": 0.0, "over": "b"}, {"a": dict(enumerate([0.5] * 4 + [0.7] * 4)), "b": dict.fromkeys(range(8), 0.5)}, "held", None),
        ({"at_least": 0.3, "over": "b"}, {"a": {1: 0.9, 2: 0.5, 3: 0.7}, "b": {1: 0.5, 2: 0.1, 3: "running"}}, "cannot tell",
         "b: seed 3: running"),
        ({"at_least": 0.3, "over": "b"}, {"a": {1: 0.9, 2: "running"}, "b": {1: "left out", 2: "left out"}}, "cannot tell",
         "a: seed 2: running; b: left out"),
    ],
)  # fmt: skip
def test_a_verdict_is_by_the_interval(bounds, scores, verdict, why):
    """scores: of each seed, or why it has none."""
    given = {name: {seed: score for seed, score in of.items() if not isinstance(score, str)} for name, of in scores.items()}
    missing = {name: {seed: score for seed, score in of.items() if isinstance(score, str)} for name, of in scores.items()}
    got = judge(Expectation("test/exact_match", "a", "a book", **bounds), given, missing)
    assert (got.verdict, got.why) == (verdict, why)
    assert "over" in bounds or (got.found.n if got.found else 0) == len(given["a"])
