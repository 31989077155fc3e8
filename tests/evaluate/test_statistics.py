"""Estimates and intervals, against their definitions."""

import math
from itertools import combinations
from random import Random

import pytest

from aropd_mcore.evaluate.statistics import accuracy, bootstrap, interval, pass_at, wilson


@pytest.mark.parametrize("num_right", range(7))
@pytest.mark.parametrize("k", [1, 2, 5, 6])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(num_right, k):
    problem = [i < num_right for i in range(6)]
    draws = list(combinations(problem, k))
    assert pass_at(k, [problem, [True] * 6]) == pytest.approx(
        (sum(map(any, draws)) / len(draws) + 1) / 2
    )


@pytest.mark.parametrize(("num_right", "num"), [(0, 10), (3, 10), (10, 10), (700, 1319)])
def test_wilsons_bounds_are_where_the_score_test_just_rejects(num_right, num):
    for bound in wilson(num_right, num):
        p = num_right / num
        if 1e-9 < bound < 1 - 1e-9:
            score = (p - bound) / math.sqrt(bound * (1 - bound) / num)
            assert abs(score) == pytest.approx(1.959964, rel=1e-6)
        else:
            assert bound == pytest.approx(p, abs=1e-12)


def test_samples_of_a_problem_are_not_independent():
    """Eight samples that agree say no more than one: the bootstrap knows it, Wilson would not."""
    random = Random(0)
    one = [[random.random() < 0.4] for _ in range(200)]
    eight = [problem * 8 for problem in one]
    assert accuracy(eight) == accuracy(one)
    low, high = interval(one)
    assert (low, high) == wilson(sum(map(sum, one)), 200)
    assert interval(eight) == bootstrap(eight) == pytest.approx((low, high), abs=0.015)
    naive = wilson(sum(map(sum, eight)), 1600)
    assert high - low > 2 * (naive[1] - naive[0])


def test_intervals_cover_what_they_estimate():
    """Of 200 experiments with problems of different difficulty; 95 % of 200, less three sigma."""
    random = Random(1)
    hits = 0
    for experiment in range(200):
        chances = [random.random() ** 2 for _ in range(60)]  # of mean 1/3
        samples = [[random.random() < chance for _ in range(4)] for chance in chances]
        low, high = bootstrap(samples, seed=experiment)
        hits += low <= 1 / 3 <= high
    assert hits >= 180
