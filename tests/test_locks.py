"""The lock of a run's folder: it has one holder, which errors describe, and ends with it."""

import fcntl
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from aropd_mcore import locks
from aropd_mcore.locks import InUse, RunLock
from tests.conftest import REPO
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import write_run
from tests.support.training import train_on_ranks

HOLDER = """
import os, sys, time
from pathlib import Path
from aropd_mcore.locks import RunLock
lock = RunLock(Path(sys.argv[1]))
if os.fork() == 0:  # like a checkpoint's writing process that hangs in the kernel
    print(os.getpid(), flush=True)
time.sleep(600)
"""


@pytest.fixture
def short_wait(monkeypatch):
    monkeypatch.setattr(locks, "_PATIENCE", 0.2)


def test_lock_of_a_killed_holder_with_a_living_fork_is_free(tmp_path, short_wait, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], cwd=REPO, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    fork = int(holder.stdout.readline())
    try:
        message = re.escape(f"output_dir {tmp_path} is in use by another run (host ")
        message += rf".*, pid {holder.pid}, since .*, Slurm job 123\): wait until that run ends"
        with pytest.raises(InUse, match=message):
            RunLock(tmp_path)
        holder.kill()
        holder.wait()
        os.kill(fork, 0)  # raises if the fork has ended
        RunLock(tmp_path).close()
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
        os.kill(fork, signal.SIGKILL)


def test_run_lock_waits_for_a_holder_that_is_ending(tmp_path):
    program = "import sys, time; from pathlib import Path; from aropd_mcore.locks import RunLock\n"
    program += "lock = RunLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(1)"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], cwd=REPO, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        RunLock(tmp_path).close()
        assert holder.wait() == 0


def test_run_lock_on_a_file_system_without_locks_succeeds(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError("Function not implemented")

    monkeypatch.setattr(fcntl, "flock", fail)
    RunLock(tmp_path).close()


def test_every_rank_of_a_second_run_raises_the_same_error_before_it_writes(tmp_path):
    path = write_run(tmp_path)
    lock = RunLock(tmp_path / "out")
    messages = run_ranks(second_run_error, 2, path)
    assert messages[0] == messages[1] and f"pid {os.getpid()}" in messages[0]
    assert [file.name for file in (tmp_path / "out").iterdir()] == [".lock"]
    lock.close()
    run_ranks(train_on_ranks, 2, path, ["training.num_steps=1"])
    RunLock(tmp_path / "out").close()  # the run released the lock, although its ranks live on


def second_run_error(path: Path) -> str:
    locks._PATIENCE, patience = 0.2, locks._PATIENCE
    try:
        with pytest.raises(InUse) as failed:
            train_on_ranks(path, [])
    finally:
        locks._PATIENCE = patience
    return str(failed.value)
