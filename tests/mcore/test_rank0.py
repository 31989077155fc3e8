"""Tests of run_on_rank0: every rank gets the result or the error."""

import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from aropd_mcore import heartbeat
from aropd_mcore.convert import folders
from aropd_mcore.mcore import rank0
from aropd_mcore.mcore.rank0 import run_on_rank0
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import write_model


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


def test_ranks_keep_their_heartbeat_while_rank_0_writes_weights(tmp_path):
    model = write_model(tmp_path / "model")
    run_ranks(write_slowly, 2, model, tmp_path / "out", timeout=400)


def write_slowly(model_folder: Path, out: Path) -> None:
    """Rank 0 writes a model until rank 1, which only waits, has sent many heartbeats."""
    from aropd_mcore.mcore import runtime, weights
    from aropd_mcore.mcore.model import build_model

    here = runtime.start()
    model = build_model(model_folder, here, dtype=torch.float32)
    is_waiting, usual_beat, usual_write = out.with_suffix(".waits"), heartbeat.beat, folders.sync
    own_beats: list[heartbeat.Beat] = []
    num_beats = 0

    def counted_beat(*args) -> None:
        nonlocal num_beats
        num_beats += 1
        if here.rank == 1 and num_beats == 20:
            is_waiting.touch()
        usual_beat(*args)

    def sync_when_rank1_waits(path: Path) -> None:
        own_beats.append(heartbeat.last_beat())
        for _ in range(2000):
            if is_waiting.exists():
                return usual_write(path)
            time.sleep(0.1)
        raise AssertionError("rank 1 sends no heartbeats")

    with (
        patch.object(heartbeat, "beat", counted_beat),
        patch.object(rank0, "HEARTBEAT_SECONDS", 0.01),
        patch.object(folders, "sync", sync_when_rank1_waits),
    ):
        weights.export_model(model, model_folder, out, here)
    if here.rank == 0:  # a heartbeat between any two files
        assert len(own_beats) > 3 and len({id(one) for one in own_beats[:-1]}) >= 3
    runtime.stop()
