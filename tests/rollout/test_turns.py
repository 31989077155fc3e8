"""Turns of pipeline stages that decode groups of rows."""

import pytest

from aropd_mcore.rollout.turns import Pass, turns


@pytest.mark.parametrize("num_chunks", [1, 2, 3])
@pytest.mark.parametrize(
    ("num_stages", "num_groups"), [(1, 1), (2, 1), (2, 2), (4, 1), (4, 3), (4, 4)]
)
def test_each_pass_follows_those_that_it_needs(num_stages, num_groups, num_chunks):
    num_tokens = 3
    of_stages = [
        list(turns(stage, num_stages, num_chunks, num_tokens=num_tokens, num_groups=num_groups))
        for stage in range(num_stages)
    ]
    assert len({len(of_stage) for of_stage in of_stages}) == 1
    done: dict[Pass, list[int]] = {}  # stages that each pass has been on
    ended: set[tuple[int, int]] = set()
    for at_once in zip(*of_stages, strict=True):
        before = {work: list(stages) for work, stages in done.items()}
        for stage, turn in enumerate(at_once):
            assert turn.ended == at_once[0].ended
            if (work := turn.work) is None:
                continue
            if stage:
                assert before[work] == list(range(stage))
            elif work.chunk:
                previous = Pass(work.token, work.group, work.chunk - 1)
                assert before[previous] == list(range(num_stages))
            elif work.token:
                assert (work.token - 1, work.group) in ended
            done.setdefault(work, []).append(stage)
        if (last := at_once[0].ended) is not None:
            assert last == at_once[-1].work and last.chunk == num_chunks - 1
            ended.add((last.token, last.group))
    assert len(ended) == num_tokens * num_groups
    assert len(done) == num_tokens * num_groups * num_chunks


@pytest.mark.parametrize("num_stages", [2, 4])
def test_as_many_groups_as_stages_keep_every_stage_busy(num_stages):
    for stage in range(num_stages):
        work = [
            turn.work for turn in turns(stage, num_stages, 1, num_tokens=9, num_groups=num_stages)
        ]
        assert work.count(None) == num_stages - 1, "only at the beginning and at the end"
        alone = [turn.work for turn in turns(stage, num_stages, 1, num_tokens=9, num_groups=1)]
        assert alone.count(None) == 9 * (num_stages - 1)
