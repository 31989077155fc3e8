"""Packing: every sample once, no microbatch over the budget, equal numbers on all ranks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aropd_mcore.data.packing import consecutive, packed

BUDGET = 40
lengths = st.lists(st.tuples(*[st.integers(1, BUDGET)] * 3), min_size=1, max_size=30)


@given(lengths, st.integers(1, 4), st.integers(1, 3))
def test_packed_uses_every_sample_once_within_the_budget(lengths_N, num_ranks, multiple):
    ranks = packed(lengths_N, num_ranks=num_ranks, budget=BUDGET, count_multiple=multiple)
    assert len(ranks) == num_ranks
    assert len({len(groups) for groups in ranks}) == 1 and len(ranks[0]) % multiple == 0
    members = [index for groups in ranks for group in groups for index in group]
    assert sorted(members) == list(range(len(lengths_N)))
    for groups in ranks:
        for group in groups:
            assert all(
                sum(view) <= BUDGET for view in zip(*(lengths_N[i] for i in group), strict=True)
            )
    loads = [sum(sum(lengths_N[i]) for group in groups for i in group) for groups in ranks]
    assert max(loads) - min(loads) <= max(map(sum, lengths_N))
    assert ranks == packed(lengths_N, num_ranks=num_ranks, budget=BUDGET, count_multiple=multiple)


def test_packed_of_one_long_and_many_short_samples_separates_them():
    lengths_N = [(1,)] * 20 + [(BUDGET,)] + [(1,)] * 20
    (groups,) = packed(lengths_N, num_ranks=1, budget=BUDGET)
    assert [len(group) for group in groups] == [1, 40]
    long, short = packed(lengths_N, num_ranks=2, budget=BUDGET)
    assert long == [[20]] and [len(group) for group in short] == [40]


def test_packed_of_a_sample_over_the_budget_is_refused():
    with pytest.raises(ValueError, match="a sample has 41 tokens, expected at most 40"):
        packed([(3, 41)], num_ranks=1, budget=BUDGET)


def test_consecutive_keeps_the_order():
    assert consecutive(5, 2) == [[0, 1], [2, 3], [4]]
