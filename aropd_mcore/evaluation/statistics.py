"""Estimates from graded samples, and their 95 % intervals.

A problem's samples are a list of booleans, True where one is right.
"""

import math
from collections.abc import Iterator, Sequence
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
    return _percentiles(
        [num_right[chosen].sum() / num[chosen].sum() for chosen in _resamples(len(samples), seed)]
    )


def auc(values: np.ndarray, right: np.ndarray, weights: np.ndarray | None = None) -> float | None:
    """Area under the ROC curve: how often a right response has the higher value; a tie counts half.

        sum_ij w_i w_j ([v_i > v_j] + [v_i = v_j] / 2) / sum_ij w_i w_j,   i right, j wrong

    Source: Hanley and McNeil, 1982: the Mann-Whitney statistic.

    Args:
        values: [N], of the responses.
        right: bool [N].
        weights: [N], how often each response counts; None: once.
    Returns:
        A number from 0 to 1, 0.5 by chance; None where there is no pair.
    """
    weights = np.ones(len(values)) if weights is None else weights
    _, place = np.unique(values, return_inverse=True)  # in ascending order
    of_right, of_wrong = (np.bincount(place, weights * kind) for kind in (right, ~right))
    pairs = of_right.sum() * of_wrong.sum()
    below = np.cumsum(of_wrong) - of_wrong
    return float((of_right * (below + of_wrong / 2)).sum() / pairs) if pairs else None


def auc_interval(
    values: np.ndarray, right: np.ndarray, problems: Sequence[int], *, seed: int = 0
) -> tuple[float, float] | None:
    """Percentile interval of `auc` over problems drawn with replacement.

    Draws without a right or without a wrong response are left out.

    Args:
        problems: [N], the problem that each response answers.
    Returns:
        None for a single problem.
    """
    names, problem_of = np.unique(problems, return_inverse=True)
    if len(names) < 2:
        return None
    found = []
    for chosen in _resamples(len(names), seed):
        count = np.bincount(chosen.astype(np.int64), minlength=len(names))
        found.append(auc(values, right, count[problem_of]))
    known = [value for value in found if value is not None]
    return _percentiles(known) if known else None


def _resamples(num: int, seed: int) -> Iterator[np.ndarray]:
    """Indices below `num`, drawn with replacement, once per resample."""
    # Raw draws, since numpy keeps their stream from one release to the next.
    draws = np.random.PCG64(seed)
    for _ in range(_NUM_RESAMPLES):
        yield draws.random_raw(num) % np.uint64(num)


def _percentiles(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
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


def percent(values: Sequence[float], *, sign: str = "", digits: int = 1) -> str:
    """Write the mean of shares over seeds and its interval in percent, such as `52.5 ± 2.8`.

    Args:
        sign: "+" writes the sign of a positive mean too.
    """
    if not values:
        return "–"
    middle, half = over_seeds(values)
    text = f"{100 * middle:{sign}.{digits}f}"
    return text if half is None else f"{text} ± {100 * half:.{digits}f}"
