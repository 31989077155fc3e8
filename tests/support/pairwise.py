"""Few rows of settings that show every pair of values that all rows show."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any


def pairs(row: Mapping[str, Any]) -> set[tuple]:
    """Every two settings of a row, with their values."""
    return set(combinations(sorted(row.items()), 2))


def covering_rows(rows: Sequence[Mapping[str, Any]], costs: Sequence[float]) -> list[int]:
    """Indices of rows that together have every pair of `rows`: most new pairs per cost first."""
    missing = set().union(*map(pairs, rows))
    chosen = []
    while missing:
        best = max(range(len(rows)), key=lambda i: len(pairs(rows[i]) & missing) / costs[i])
        chosen.append(best)
        missing -= pairs(rows[best])
    return chosen
