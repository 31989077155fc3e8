"""Test of background saves on a GPU: a run is stopped, killed and resumed by the command line.

Here the writing process is forked from a process that uses CUDA. tests/faults tests the contents of
checkpoints on CPU ranks.
"""

import signal

import pytest
import torch

from tests.support.gpu import require_gpu
from tests.support.jobs import Job
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import write_run
from tests.support.training import read_checkpoints, read_lines, repeatable

pytestmark = pytest.mark.gpu
NUM_STEPS = 12


def test_run_that_is_stopped_and_killed_ends_with_the_same_weights(tmp_path, monkeypatch):
    """The checkpoints at the end, with weights, teacher and optimizer, are bitwise equal."""
    require_gpu()
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")  # attention's backward
    settings = {"training": {"num_steps": NUM_STEPS}, "checkpoint": {"save_every_steps": 2}}
    paths = {name: write_run(tmp_path / name, **settings) for name in ("whole", "stopped")}
    path, out = paths["stopped"], tmp_path / "stopped" / "out"

    stopped = Job(path, 1)
    try:
        stopped.wait_until(lambda: len(read_lines(out)) >= 3)
        stopped.process.send_signal(signal.SIGUSR1)
        assert stopped.process.wait(120) == 75, stopped.log.read_text()
    finally:
        stopped.end()
    num_done = len(read_lines(out))

    killed = Job(path, 1)
    try:
        killed.wait_until(lambda: len(read_lines(out)) >= num_done + 3)
    finally:
        killed.end()

    for name in ("stopped", "whole"):
        last = Job(paths[name], 1)
        try:
            assert last.process.wait(300) == 0, last.log.read_text()
        finally:
            last.end()
        assert ("resuming at step" in last.log.read_text()) == (name == "stopped")

    expected_lines = read_lines(tmp_path / "whole" / "out")
    for line, expected in zip(repeatable(read_lines(out)), repeatable(expected_lines), strict=True):
        assert line == pytest.approx(expected, rel=1e-9)  # metrics are summed in any order
    actual, expected = run_ranks(read_checkpoints, 1, [out, tmp_path / "whole" / "out"])[0]
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(actual[name], value), name
