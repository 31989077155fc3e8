"""The decoder's book of rows: who stands where, and what every token sees."""

import pytest
import torch

from aropd_mcore.mcore.decode import _Rows, _runs_of_similar

CPU = torch.device("cpu")


def test_rows_come_and_go():
    rows = _Rows(4, 16)
    rows.advance([3, 2], CPU)
    assert rows.rows_N.tolist() == [0, 0, 0, 1, 1]
    assert rows.positions_N.tolist() == [0, 1, 2, 0, 1]
    assert rows.last_B.tolist() == [2, 4]
    rows.advance([2, 4], CPU)  # the next token of the two, and prompts of two new ones
    assert rows.rows_N.tolist() == [0, 1, 2, 2, 3, 3, 3, 3]
    assert rows.positions_N.tolist() == [3, 2, 0, 1, 0, 1, 2, 3]
    assert rows.last_B.tolist() == [0, 1, 3, 7]
    assert rows.buckets == [range(2, 3), range(3, 4)]
    assert rows.visible_B11L.flatten(1).tolist() == [[True] * 4, [True] * 3 + [False]]
    assert rows.drop({0, 2}) == [3, 1]  # the last of those that stay comes to the first place
    assert rows.lengths == [4, 3]
    rows.advance([], CPU)
    assert rows.positions_N.tolist() == [4, 3]
    assert rows.drop({0, 1}) == []


@pytest.mark.parametrize(
    ("lengths", "runs"),
    [
        ([], []),
        ([12], [(0, 1)]),
        ([12, 9, 8], [(0, 2), (2, 3)]),
        ([3, 12, 12, 16], [(0, 1), (1, 4)]),
    ],
)
def test_prompts_of_similar_length_attend_together(lengths, runs):
    assert [(run.start, run.stop) for run in _runs_of_similar(lengths)] == runs
