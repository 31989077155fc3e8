from itertools import product

from tests.support.pairwise import covering_rows, pairs


def test_covering_rows_have_every_pair_and_are_few():
    rows = [
        dict(zip("abcd", values, strict=True))
        for values in product((1, 2, 3), repeat=4)
        if values[0] * values[1] < 6  # as layouts: not every combination exists
    ]
    chosen = [rows[i] for i in covering_rows(rows, [1.0] * len(rows))]
    assert set().union(*map(pairs, chosen)) == set().union(*map(pairs, rows))
    assert len(chosen) < 20 < len(rows)


def test_covering_rows_prefer_what_is_cheap():
    rows = [{"a": 1, "b": 1}, {"a": 1, "b": 1}]
    assert covering_rows(rows, [2.0, 1.0]) == [1]
