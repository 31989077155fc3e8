"""Pairwise coverage: a few rows of settings that contain every pair of values of all rows."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any


def pairs(row: Mapping[str, Any]) -> set[tuple]:
    """Return all pairs of a row's settings, with their values."""
    return set(combinations(sorted(row.items()), 2))


def covering_rows(rows: Sequence[Mapping[str, Any]], costs: Sequence[float]) -> list[int]:
    """Return indices of rows that together have every pair of `rows`.

    Greedy: the row with the most new pairs per cost is chosen next.
    """
    missing = set().union(*map(pairs, rows))
    chosen = []
    while missing:
        best = max(range(len(rows)), key=lambda i: len(pairs(rows[i]) & missing) / costs[i])
        chosen.append(best)
        missing -= pairs(rows[best])
    return chosen
