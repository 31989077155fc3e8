"""Estimates from graded samples, and their 95 % intervals.

A problem's samples are a list of booleans, True where one is right.
"""

import math
from collections.abc import Sequence
from statistics import mean, stdev

import numpy as np

Samples = Sequence[Sequence[bool]]
_Z = 1.959963984540054
"""The normal distribution's 97.5 % quantile."""
_NUM_RESAMPLES = 2000
_T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; the last serves for more."""


def accuracy(samples: Samples) -> float:
    """Share of all samples that are right: with k a problem this is avg@k."""
    return sum(map(sum, samples)) / sum(map(len, samples))


def pass_at(k: int, samples: Samples) -> float:
    """Probability that one of k samples of a problem is right, over the problems' mean.

        1 - C(n - c, k) / C(n, k),   n samples, c of them right

    Source: Chen et al., arXiv:2107.03374, equation 1: unbiased for k <= n.
    """

    def of(problem: Sequence[bool]) -> float:
        n, c = len(problem), sum(problem)
        return 1.0 - math.comb(n - c, k) / math.comb(n, k)

    return sum(map(of, samples)) / len(samples)


def interval(samples: Samples, *, seed: int = 0) -> tuple[float, float]:
    """Of `accuracy`: Wilson's where each problem has one sample, else by `bootstrap`, since samples
    of one problem are not independent."""
    if all(len(problem) == 1 for problem in samples):
        return wilson(sum(map(sum, samples)), len(samples))
    return bootstrap(samples, seed=seed)


def wilson(num_right: int, num: int) -> tuple[float, float]:
    """Wilson's score interval.

        (p + z^2 / 2n ± z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    Source: Wilson, 1927.
    """
    p, z2 = num_right / num, _Z * _Z
    centre = p + z2 / (2 * num)
    half = _Z * math.sqrt(p * (1 - p) / num + z2 / (4 * num * num))
    low, high = ((centre + sign * half) / (1 + z2 / num) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


def bootstrap(samples: Samples, *, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of `accuracy` over problems drawn with replacement."""
    num_right = np.array([sum(problem) for problem in samples])
    num = np.array([len(problem) for problem in samples])
    # Raw draws, since numpy keeps their stream from one release to the next.
    draws = np.random.PCG64(seed)
    means = []
    for _ in range(_NUM_RESAMPLES):
        chosen = draws.random_raw(len(samples)) % np.uint64(len(samples))
        means.append(num_right[chosen].sum() / num[chosen].sum())
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def over_seeds(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean of one number per seed, and half of its 95 % interval.

        t_{0.975, n - 1} s / sqrt(n),   n values with standard deviation s

    Returns:
        The second is None for one value. With more than 10 values it is slightly too wide.
    """
    if len(values) < 2:
        return mean(values), None
    t = _T_975[min(len(values) - 1, len(_T_975)) - 1]
    return mean(values), t * stdev(values) / math.sqrt(len(values))
