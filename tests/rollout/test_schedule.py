"""Assignment of responses to rows, against a simulation of the rows' cached keys."""

import random

import pytest

from aropd_mcore.rollout.schedule import Schedule

LIMIT = 9


def simulate(prompts: list[list[int]], num_rows: int, seed: int) -> tuple[dict[int, int], int]:
    """Run a schedule with random lengths of the responses.

    Returns:
        The length of each finished response, and the number of prompts that passed the model.
    """
    numbers = random.Random(seed)
    wanted = [numbers.randint(1, LIMIT) for _ in prompts]
    schedule = Schedule(prompts, num_rows, LIMIT)
    keys: list[list[int] | None] = [None] * num_rows
    response_of, counts = [-1] * num_rows, [0] * num_rows
    lengths: dict[int, int] = {}
    num_prefills = 0
    while True:
        fill = schedule.fill()
        if not schedule.num_missing:
            assert not schedule.num_unfinished
            return lengths, num_prefills
        before = set(fill.prefills) | set(fill.copies)
        for row, response in fill.prefills.items():
            keys[row] = prompts[response]
        num_prefills += len(fill.prefills)
        sources = {row: keys[source] for row, source in fill.copies.items()}  # all at once
        for row, copied in sources.items():
            keys[row] = copied
        for row, response in fill.started.items():
            assert len(prompts[response]) == 1 or keys[row] == prompts[response], before
            response_of[row], counts[row] = response, 0
        running = [row for row in range(schedule.num_rows) if response_of[row] >= 0]
        new = [len(prompts[response_of[row]]) + counts[row] for row in running]
        assert schedule.num_keys == max(new)
        for row in running:
            counts[row] = min(counts[row] + 3, wanted[response_of[row]])
        is_done = [r < 0 or counts[row] == wanted[r] for row, r in enumerate(response_of)]
        for row, response in schedule.finish(counts, is_done).items():
            assert response_of[row] == response and response not in lengths
            lengths[response], response_of[row] = counts[row], -1
        assert lengths.keys().isdisjoint(response_of)
        for source, target in schedule.shrink().items():
            assert response_of[target] < 0 <= response_of[source]
            keys[target], counts[target] = keys[source], counts[source]
            response_of[target], response_of[source] = response_of[source], -1
        assert max((row for row, r in enumerate(response_of) if r >= 0), default=0) < (
            schedule.num_rows
        )


@pytest.mark.parametrize("num_rows", [1, 2, 5, 8, 40])
def test_schedule_runs_each_response_once_with_the_keys_of_its_prompt(num_rows):
    numbers = random.Random(num_rows)
    for seed in range(30):
        distinct = [[numbers.randrange(9)] * numbers.randint(1, 4) for _ in range(6)]
        prompts = [prompt for prompt in distinct for _ in range(4)]
        numbers.shuffle(prompts)
        lengths, _ = simulate(prompts, num_rows, seed)
        assert sorted(lengths) == list(range(len(prompts)))


@pytest.mark.parametrize("num_rows", [3, 4, 8])
def test_prompt_with_four_responses_passes_the_model_once(num_rows):
    prompts = [[index, 5, 6] for index in range(6) for _ in range(4)]
    for seed in range(10):
        assert simulate(prompts, num_rows, seed)[1] == 6


def test_rows_shrink_to_a_power_of_two_when_nothing_waits():
    schedule = Schedule([[1, index] for index in range(7)], 6, LIMIT)
    schedule.fill()
    assert schedule.finish([3] * 6, [True] * 2 + [False] * 4) == {0: 0, 1: 1}
    assert schedule.shrink() == {} and schedule.num_rows == 6, "one response waits"
    schedule.fill()
    schedule.finish([3] * 6, [False, True, True, False, False, True])
    assert schedule.shrink() == {4: 1} and schedule.num_rows == 4
    schedule.finish([4] * 4, [True] * 4)
    assert schedule.shrink() == {} and schedule.num_rows == 1
    assert schedule.num_missing == 0
