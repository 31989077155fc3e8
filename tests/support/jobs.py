"""`aropd train` as users start it, to be watched from outside and killed."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.support.training import command, environment

_MARK = "AROPD_TEST_JOB"
"""Ranks are in sessions of their own: what belongs to a job is known by its environment."""


class Job:
    """`aropd train` with its ranks, in a session of their own."""

    def __init__(self, path: Path, num_ranks: int, *overrides: str, torchrun: bool = False):
        self.mark = uuid.uuid4().hex
        self.log = path.parent / f"job-{self.mark}.log"
        if torchrun:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            launcher += [f"--nproc-per-node={num_ranks}", "-m"]
            words = [*launcher, *command(path, *overrides)[2:]]
        else:
            words = command(path, *overrides, "--nproc-per-node", str(num_ranks))
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                words,
                env=environment(**{_MARK: self.mark}),
                cwd=REPO,
                stdout=file,
                stderr=file,
            )

    def wait_until(self, is_time: Callable[[], bool], seconds: float = 300) -> None:
        until = time.monotonic() + seconds
        while not is_time():
            if self.process.poll() is not None or time.monotonic() > until:
                pytest.fail(f"the job ended, or hung, before its kill:\n{self.log.read_text()}")
            time.sleep(0.002)

    def kill(self, rank: int | None) -> None:
        """One rank, whose death must end the job by itself; or, with None, all there is."""
        if rank is None:
            self.end()
            return
        self.wait_until(lambda: self.pid_of(rank) is not None)
        pid = self.pid_of(rank)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        assert self.process.wait(60) != 0, "the job went on without one of its ranks"
        self.check_nothing_is_left()

    def check_nothing_is_left(self) -> None:
        """No process of the job outlives its launcher by more than ten seconds."""
        until = time.monotonic() + 10
        while left := self.processes():
            if time.monotonic() > until:
                names = [command_of(pid) for pid in left]
                pytest.fail(f"the job left processes behind: {names}")
            time.sleep(0.05)

    def end(self) -> None:
        """Nothing of the job lives on."""
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def pid_of(self, rank: int) -> int | None:
        """Of the rank's process, once it has started."""
        for pid, environ in self.processes().items():
            if f"RANK={rank}" in environ and parent_of(pid) == self.process.pid:
                return pid
        return None

    def processes(self) -> dict[int, list[str]]:
        """The job's processes, ranks and what ranks have started, each with its environment."""
        mark = f"{_MARK}={self.mark}"
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            environ = read_text(entry / "environ").split("\0")
            if mark in environ:
                found[int(entry.name)] = environ
        return found


def parent_of(pid: int) -> int:
    fields = read_text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return int(fields[1]) if fields else 0


def command_of(pid: int) -> str:
    return read_text(Path(f"/proc/{pid}/cmdline")).replace("\0", " ").strip()


def read_text(path: Path) -> str:
    """Empty where the process is gone."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
