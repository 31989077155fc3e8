"""The pool of ranks: results in rank order, and the errors of every rank."""

import os

import pytest
import torch
import torch.distributed as dist

from tests.support.ranks import RankError, run_ranks


def add_up(offset: int) -> tuple[int, float, int]:
    total = torch.tensor(float(dist.get_rank() + offset))
    dist.all_reduce(total)
    return dist.get_rank(), total.item(), os.getpid()


def fail_on(failing_rank: int) -> None:
    if dist.get_rank() == failing_rank:
        raise RuntimeError("a planted error")
    dist.barrier()


def die_on(dying_rank: int) -> None:
    if dist.get_rank() == dying_rank:
        os._exit(7)
    dist.barrier()


def hang_on(hanging_rank: int) -> None:
    while dist.get_rank() == hanging_rank:
        pass


def test_run_ranks_returns_results_in_rank_order_from_reused_processes():
    two, three = run_ranks(add_up, 2, 10), run_ranks(add_up, 3, 0)
    assert [result[:2] for result in two] == [(0, 21.0), (1, 21.0)]
    assert [result[:2] for result in three] == [(0, 3.0), (1, 3.0), (2, 3.0)]
    assert [result[2] for result in two] == [result[2] for result in three[:2]]


def test_run_ranks_with_failed_ranks_shows_their_errors_and_recovers():
    with pytest.raises(RankError) as caught:
        run_ranks(fail_on, 2, 1)
    first, second = str(caught.value).split("--- rank 0 of 2 ---")
    assert "--- rank 1 of 2 ---" in first and "RuntimeError: a planted error" in first
    assert "dist.barrier()" in second

    with pytest.raises(RankError, match="rank 0 of 2 ---\ndied, exit code 7"):
        run_ranks(die_on, 2, 0)
    assert [result[1] for result in run_ranks(add_up, 2, 0)] == [1.0, 1.0]


def test_run_ranks_with_a_hung_rank_shows_its_stack():
    run_ranks(add_up, 2, 0)  # imports are not part of the time limit below
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2 ---\n.*did not finish.*in hang_on"):
        run_ranks(hang_on, 2, 1, timeout=2)
