"""`aropd train` as a subprocess that tests observe and kill."""

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
"""Environment variable that marks a job's processes. Their session does not identify them, because
each rank has its own."""


class Job:
    """A running `aropd train` with its ranks."""

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
                pytest.fail(
                    f"the job ended or hung before the expected event:\n{self.log.read_text()}"
                )
            time.sleep(0.002)

    def kill(self, rank: int | None) -> None:
        """Kill one rank and check that the job ends. None: kill all processes of the job."""
        if rank is None:
            self.end()
            return
        self.wait_until(lambda: self.pid_of(rank) is not None)
        pid = self.pid_of(rank)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        assert self.process.wait(60) != 0, "the job succeeded without one of its ranks"
        self.check_nothing_is_left()

    def check_nothing_is_left(self) -> None:
        """Check that all processes of the job end within ten seconds after the launcher."""
        until = time.monotonic() + 10
        while left := self.processes():
            if time.monotonic() > until:
                names = [command_of(pid) for pid in left]
                pytest.fail(f"the job left processes behind: {names}")
            time.sleep(0.05)

    def end(self) -> None:
        """Kill all processes of the job."""
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def pid_of(self, rank: int) -> int | None:
        """Return the process id of a rank, or None before the rank has started."""
        for pid, environ in self.processes().items():
            if f"RANK={rank}" in environ and parent_of(pid) == self.process.pid:
                return pid
        return None

    def processes(self) -> dict[int, list[str]]:
        """Return pid -> environment of the job's processes: launcher, ranks and their children."""
        mark = f"{_MARK}={self.mark}"
        environs = {}
        for entry in Path("/proc").glob("[0-9]*"):
            environ = read_text(entry / "environ").split("\0")
            if mark in environ:
                environs[int(entry.name)] = environ
        return environs


def parent_of(pid: int) -> int:
    fields = read_text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return int(fields[1]) if fields else 0


def command_of(pid: int) -> str:
    return read_text(Path(f"/proc/{pid}/cmdline")).replace("\0", " ").strip()


def read_text(path: Path) -> str:
    """Read a file of /proc. Return an empty string if the process has ended."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
