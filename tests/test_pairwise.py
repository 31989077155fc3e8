"""Selection of rows that cover every pair of values."""

from itertools import product

from tests.support.pairwise import covering_rows, pairs


def test_covering_rows_contain_every_pair_in_few_rows():
    rows = [
        dict(zip("abcd", values, strict=True))
        for values in product((1, 2, 3), repeat=4)
        if values[0] * values[1] < 6  # as for layouts, not every combination exists
    ]
    chosen = [rows[i] for i in covering_rows(rows, [1.0] * len(rows))]
    assert set().union(*map(pairs, chosen)) == set().union(*map(pairs, rows))
    assert len(chosen) < 20 < len(rows)


def test_covering_rows_of_equal_rows_choose_the_cheapest():
    rows = [{"a": 1, "b": 1}, {"a": 1, "b": 1}]
    assert covering_rows(rows, [2.0, 1.0]) == [1]
