"""The decoder's table of rows: places, positions and attention masks."""

import pytest
import torch

from aropd_mcore.mcore.decode import _Rows, _runs_of_similar

CPU = torch.device("cpu")


def test_rows_after_new_and_dropped_rows_keep_positions_and_masks():
    rows = _Rows(4, 16)
    rows.advance([3, 2], CPU)
    assert rows.rows_N.tolist() == [0, 0, 0, 1, 1]
    assert rows.positions_N.tolist() == [0, 1, 2, 0, 1]
    assert rows.last_B.tolist() == [2, 4]
    rows.advance([2, 4], CPU)  # one token of each old row, and two new prompts
    assert rows.rows_N.tolist() == [0, 1, 2, 2, 3, 3, 3, 3]
    assert rows.positions_N.tolist() == [3, 2, 0, 1, 0, 1, 2, 3]
    assert rows.last_B.tolist() == [0, 1, 3, 7]
    assert rows.buckets == [range(2, 3), range(3, 4)]
    assert rows.visible_B11L.flatten(1).tolist() == [[True] * 4, [True] * 3 + [False]]
    assert rows.drop({0, 2}) == [3, 1]  # the last remaining row moves to the first place
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
def test_runs_of_similar_groups_prompts_of_similar_length(lengths, runs):
    assert [(run.start, run.stop) for run in _runs_of_similar(lengths)] == runs
