"""Estimates from graded samples and their 95 % confidence intervals.

The samples of a problem are a list of booleans, True for a right sample.
"""

import math
from collections.abc import Iterator, Sequence
from statistics import mean, stdev

import numpy as np

Samples = Sequence[Sequence[bool]]
_Z = 1.959963984540054
"""97.5 % quantile of the normal distribution."""
_NUM_RESAMPLES = 2000
_T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom. The last is used beyond 9."""


def accuracy(samples: Samples) -> float:
    """Return the share of right samples. With k samples per problem this is avg@k."""
    return sum(map(sum, samples)) / sum(map(len, samples))


def pass_at(k: int, samples: Samples) -> float:
    """Estimate pass@k: the probability that at least one of k samples of a problem is right.

        mean over problems of 1 - C(n - c, k) / C(n, k),   n samples, c right samples

    Source: Chen et al., arXiv:2107.03374, equation 1. Unbiased for k <= n.
    """

    def pass_probability(problem: Sequence[bool]) -> float:
        n, c = len(problem), sum(problem)
        return 1.0 - math.comb(n - c, k) / math.comb(n, k)

    return sum(map(pass_probability, samples)) / len(samples)


def interval(samples: Samples, *, seed: int = 0) -> tuple[float, float]:
    """Compute a 95 % interval of `accuracy`.

    Wilson's interval if each problem has one sample. Otherwise `bootstrap`, because samples of one
    problem are not independent.
    """
    if all(len(problem) == 1 for problem in samples):
        return wilson(sum(map(sum, samples)), len(samples))
    return bootstrap(samples, seed=seed)


def wilson(num_right: int, num: int) -> tuple[float, float]:
    """Compute Wilson's score interval.

        (p + z^2 / 2n ± z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    Source: Wilson, 1927.
    """
    p, z2 = num_right / num, _Z * _Z
    centre = p + z2 / (2 * num)
    half = _Z * math.sqrt(p * (1 - p) / num + z2 / (4 * num * num))
    low, high = ((centre + sign * half) / (1 + z2 / num) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


def bootstrap(samples: Samples, *, seed: int = 0) -> tuple[float, float]:
    """Compute a percentile interval of `accuracy` over problems drawn with replacement."""
    num_right = np.array([sum(problem) for problem in samples])
    num = np.array([len(problem) for problem in samples])
    return _percentiles(
        [num_right[chosen].sum() / num[chosen].sum() for chosen in _resamples(len(samples), seed)]
    )


def auc(values: np.ndarray, right: np.ndarray, weights: np.ndarray | None = None) -> float | None:
    """Compute the area under the ROC curve.

    It is the probability that a right response has a higher value than a wrong one. A tie counts
    half.

        sum_ij w_i w_j ([v_i > v_j] + [v_i = v_j] / 2) / sum_ij w_i w_j,   i right, j wrong

    Source: Hanley and McNeil, 1982 (the Mann-Whitney statistic).

    Args:
        values: [N], one value per response.
        right: bool [N], whether each response is right.
        weights: [N], number of times that each response counts. None: once.
    Returns:
        A number from 0 to 1, where 0.5 is chance. None if there is no pair.
    """
    weights = np.ones(len(values)) if weights is None else weights
    _, place = np.unique(values, return_inverse=True)  # in ascending order
    num_right, num_wrong = (np.bincount(place, weights * kind) for kind in (right, ~right))
    pairs = num_right.sum() * num_wrong.sum()
    below = np.cumsum(num_wrong) - num_wrong
    return float((num_right * (below + num_wrong / 2)).sum() / pairs) if pairs else None


def auc_interval(
    values: np.ndarray, right: np.ndarray, problems: Sequence[int], *, seed: int = 0
) -> tuple[float, float] | None:
    """Compute a percentile interval of `auc` over problems drawn with replacement.

    Resamples without a right response or without a wrong response are skipped.

    Args:
        values, right: see `auc`.
        problems: [N], number of the problem that each response answers.
    Returns:
        None if there is only one problem or all resamples are skipped.
    """
    names, problem_index = np.unique(problems, return_inverse=True)
    if len(names) < 2:
        return None
    aucs = []
    for chosen in _resamples(len(names), seed):
        count = np.bincount(chosen.astype(np.int64), minlength=len(names))
        aucs.append(auc(values, right, count[problem_index]))
    known = [value for value in aucs if value is not None]
    return _percentiles(known) if known else None


def _resamples(num: int, seed: int) -> Iterator[np.ndarray]:
    """Yield the indices below `num` of each resample, drawn with replacement."""
    # Raw draws, because numpy guarantees their stream across releases.
    draws = np.random.PCG64(seed)
    for _ in range(_NUM_RESAMPLES):
        yield draws.random_raw(num) % np.uint64(num)


def _percentiles(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def over_seeds(values: Sequence[float]) -> tuple[float, float | None]:
    """Compute the mean of one number per seed, and half the width of its 95 % interval.

        t_{0.975, n - 1} s / sqrt(n),   n values with standard deviation s

    Returns:
        Mean and half-width. The half-width is None for one value, and slightly too large for more
        than 10 values.
    """
    if len(values) < 2:
        return mean(values), None
    t = _T_975[min(len(values) - 1, len(_T_975)) - 1]
    return mean(values), t * stdev(values) / math.sqrt(len(values))


def percent(values: Sequence[float], *, sign: str = "", digits: int = 1) -> str:
    """Format the mean of shares over seeds and its interval in percent, such as `52.5 ± 2.8`.

    Args:
        values: one share per seed.
        sign: "+" also prints the sign of a positive mean.
        digits: number of digits after the decimal point.
    """
    if not values:
        return "–"
    middle, half = over_seeds(values)
    text = f"{100 * middle:{sign}.{digits}f}"
    return text if half is None else f"{text} ± {100 * half:.{digits}f}"
