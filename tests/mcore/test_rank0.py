"""Work of rank 0: every rank gets its result, or its error."""

import time

import pytest
import torch.distributed as dist

from aropd_mcore.mcore import rank0
from aropd_mcore.mcore.rank0 import run_on_rank0
from tests.support.ranks import run_ranks


class Unpicklable(Exception):
    """An error that pickle cannot rebuild: it does not keep its arguments."""

    def __init__(self, first: str, second: str):
        super().__init__(first + second)


@pytest.mark.parametrize("takes_long", [False, True])
def test_run_on_rank0_gives_every_rank_the_result_or_the_error(takes_long):
    run_ranks(check, 2, takes_long)


def check(takes_long: bool) -> None:
    ranks = []

    def work() -> str:
        ranks.append(dist.get_rank())
        time.sleep(0.2)
        return "done"

    usual, rank0.HEARTBEAT_SECONDS = rank0.HEARTBEAT_SECONDS, 0.01
    assert run_on_rank0(work, takes_long=takes_long) == "done"
    rank0.HEARTBEAT_SECONDS = usual
    assert ranks == ([0] if dist.get_rank() == 0 else [])

    def fail() -> None:
        raise FileNotFoundError(2, "No such file", "x")

    with pytest.raises(FileNotFoundError, match="No such file: 'x'") as raised:
        run_on_rank0(fail, takes_long=takes_long)
    assert getattr(raised.value, "is_from_rank0", False) is (dist.get_rank() != 0)

    def fail_badly() -> None:
        raise Unpicklable("a ", "reason")

    expected = Unpicklable if dist.get_rank() == 0 else RuntimeError
    with pytest.raises(expected, match="a reason"):
        run_on_rank0(fail_badly, takes_long=takes_long)
    assert run_on_rank0(lambda: None, takes_long=takes_long) is None  # the ranks are in step
