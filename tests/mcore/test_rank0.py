"""Tests of run_on_rank0: every rank gets the result or the error."""

import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch.distributed as dist

from aropd_mcore import heartbeat
from aropd_mcore.mcore import rank0
from aropd_mcore.mcore.rank0 import run_on_rank0
from tests.support.ranks import run_ranks


class Unpicklable(Exception):
    """An error that pickle cannot rebuild, because it does not keep its arguments."""

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

    original, rank0.HEARTBEAT_SECONDS = rank0.HEARTBEAT_SECONDS, 0.01
    assert run_on_rank0(work, takes_long=takes_long) == "done"
    rank0.HEARTBEAT_SECONDS = original
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
    # The ranks still run the same collectives.
    assert run_on_rank0(lambda: None, takes_long=takes_long) is None


def test_ranks_send_heartbeats_while_rank_0_works(tmp_path):
    run_ranks(work_until_rank1_waits, 2, tmp_path / "waits")


def work_until_rank1_waits(is_waiting: Path) -> None:
    """Rank 0 works until rank 1, which only waits, has sent many heartbeats."""
    usual_beat, num_beats = heartbeat.beat, 0

    def counted_beat(*args) -> None:
        nonlocal num_beats
        num_beats += 1
        if dist.get_rank() == 1 and num_beats == 20:
            is_waiting.touch()
        usual_beat(*args)

    def work() -> bool:
        for _ in range(500):
            if is_waiting.exists():
                return True
            time.sleep(0.1)
        return False

    with (
        patch.object(heartbeat, "beat", counted_beat),
        patch.object(rank0, "HEARTBEAT_SECONDS", 0.01),
    ):
        assert run_on_rank0(work), "rank 1 sends no heartbeats"
