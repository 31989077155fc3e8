"""Test of background saves on a GPU: a run is stopped, killed and resumed by the command line.

Here the writing process is forked from a process that uses CUDA. tests/faults tests the contents of
checkpoints on CPU ranks.
"""

import signal

import pytest
import torch

from tests.support.jobs import Job
from tests.support.tiny_runs import write_run
from tests.support.training import read_lines

pytestmark = pytest.mark.gpu
NUM_STEPS = 12


def test_run_resumes_after_a_stop_and_a_kill(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    checkpoint = {"save_every_steps": 2}
    path = write_run(tmp_path, training={"num_steps": NUM_STEPS}, checkpoint=checkpoint)
    out = tmp_path / "out"

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

    last = Job(path, 1)
    try:
        assert last.process.wait(300) == 0, last.log.read_text()
    finally:
        last.end()
    assert [line["step"] for line in read_lines(out)] == list(range(NUM_STEPS))
    assert "resuming at step" in last.log.read_text()
