"""Tests of estimates and intervals against their definitions."""

import math
from itertools import combinations
from random import Random

import numpy as np
import pytest

from aropd_mcore.evaluation.statistics import (
    accuracy,
    auc,
    auc_interval,
    bootstrap,
    interval,
    pass_at,
    wilson,
)


@pytest.mark.parametrize("num_right", range(7))
@pytest.mark.parametrize("k", [1, 2, 5, 6])
def test_pass_at_k_is_the_share_of_draws_with_a_right_sample(num_right, k):
    problem = [i < num_right for i in range(6)]
    draws = list(combinations(problem, k))
    assert pass_at(k, [problem, [True] * 6]) == pytest.approx(
        (sum(map(any, draws)) / len(draws) + 1) / 2
    )


@pytest.mark.parametrize(("num_right", "num"), [(0, 10), (3, 10), (10, 10), (700, 1319)])
def test_wilson_bounds_are_the_limits_of_the_score_test(num_right, num):
    for bound in wilson(num_right, num):
        p = num_right / num
        if 1e-9 < bound < 1 - 1e-9:
            score = (p - bound) / math.sqrt(bound * (1 - bound) / num)
            assert abs(score) == pytest.approx(1.959964, rel=1e-6)
        else:
            assert bound == pytest.approx(p, abs=1e-12)


def test_interval_of_eight_equal_samples_is_as_wide_as_that_of_one():
    """Equal samples of a problem add no information. Wilson's interval would become narrower."""
    random = Random(0)
    one = [[random.random() < 0.4] for _ in range(200)]
    eight = [problem * 8 for problem in one]
    assert accuracy(eight) == accuracy(one)
    low, high = interval(one)
    assert (low, high) == wilson(sum(map(sum, one)), 200)
    assert interval(eight) == bootstrap(eight) == pytest.approx((low, high), abs=0.015)
    naive = wilson(sum(map(sum, eight)), 1600)
    assert high - low > 2 * (naive[1] - naive[0])


@pytest.mark.slow
def test_bootstrap_of_problems_of_unequal_difficulty_covers_the_true_accuracy():
    """Expect 95 % of 200 experiments, minus three standard deviations."""
    random = Random(1)
    hits = 0
    for experiment in range(200):
        chances = [random.random() ** 2 for _ in range(60)]  # the mean is 1/3
        samples = [[random.random() < chance for _ in range(4)] for chance in chances]
        low, high = bootstrap(samples, seed=experiment)
        hits += low <= 1 / 3 <= high
    assert hits >= 180


def test_auc_counts_ordered_pairs_and_half_of_the_ties():
    values = np.array([3.0, 1.0, 2.0, 2.0, 0.0])
    right = np.array([True, True, True, False, False])
    # 3 > 2, 3 > 0, 1 < 2, 1 > 0, 2 = 2, 2 > 0
    assert auc(values, right) == pytest.approx(4.5 / 6)
    assert auc(-values, right) == pytest.approx(1.5 / 6)
    # The wrong 2 counts twice: 1, 1, 0, 0, 0.5, 0.5 and 1, 1, 1.
    assert auc(values, right, np.array([1, 1, 1, 2, 1])) == pytest.approx(6 / 9)
    assert auc(values, np.ones(5, dtype=bool)) is None
    assert auc(values, right, np.array([1, 1, 1, 0, 0])) is None


def test_auc_interval_of_eight_equal_samples_equals_that_of_one():
    random = np.random.default_rng(0)
    right = random.random(120) < 0.4
    values = random.normal(size=120) + right
    problems = list(range(120))
    bounds = auc_interval(values, right, problems)
    assert bounds is not None
    area = auc(values, right)
    # Hanley and McNeil's standard error, from the variance of the mean rank of each side.
    above = np.array([[(v > w) + (v == w) / 2 for w in values[~right]] for v in values[right]])
    error = math.sqrt(above.mean(1).var(ddof=1) / right.sum() + above.mean(0).var(ddof=1) / 72)
    assert area and bounds[0] < area < bounds[1]
    assert bounds[1] - bounds[0] == pytest.approx(2 * 1.96 * error, rel=0.15)
    eight = auc_interval(np.repeat(values, 8), np.repeat(right, 8), sorted(problems * 8))
    assert eight == pytest.approx(bounds)
    assert auc_interval(values, right, [0] * 120) is None
