"""A run that is killed at any moment, again and again, ends as the run that was never killed.

`make test-faults` kills 20 times; AROPD_KILLS and AROPD_KILL_SEED choose otherwise.
"""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import REPO
from tests.ranks import run_ranks
from tests.tiny_runs import write_run
from tests.trainer.test_resume import (
    command,
    environment,
    read_checkpoints,
    read_lines,
    repeatable,
    train_on_ranks,
)

NUM_STEPS, SAVE_EVERY = 30, 2
NUM_RANKS = 4


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return write_run(
        tmp_path_factory.mktemp("kill"),
        training={"num_steps": NUM_STEPS},
        checkpoint={"save_every_steps": SAVE_EVERY},
        parallel={"tensor": 2},
        optimizer={"warmup_ratio": 0.25, "weight_decay": 0.1},
    )


def test_killed_anywhere_ends_as_if_never_killed(path):
    num_kills = int(os.environ.get("AROPD_KILLS", "3"))
    seed = int(os.environ.get("AROPD_KILL_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
    draw = random.Random(seed)
    print(f"\nAROPD_KILL_SEED={seed}: {num_kills} kills")
    out = path.parent / "out"

    for number in range(num_kills):
        job = Job(path)
        try:
            said = kill_somewhere(job, out, draw)
        finally:
            job.end()
        print(f"  {number + 1}: {said}; {len(read_lines(out))} steps reported, saved {saved(out)}")
    finished = Job(path)
    assert finished.wait(300) == 0, finished.log.read_text()

    unbroken = path.parent / "unbroken"
    run_ranks(train_on_ranks, NUM_RANKS, path, [f"output_dir={unbroken}"])
    lines = read_lines(out)
    assert [line["step"] for line in lines] == list(range(NUM_STEPS))
    assert repeatable(lines) == repeatable(read_lines(unbroken))
    found, expected = run_ranks(read_checkpoints, 1, [out, unbroken])[0]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal(found[name], value) if torch.is_tensor(value) else found[name] == value
        assert same, name


def kill_somewhere(job: "Job", out: Path, draw: random.Random) -> str:
    """Wait for a moment in a start, a step or (half of the times) a save, and kill one rank or
    all; what was done, in words."""
    num_lines, partials = len(read_lines(out)), being_written(out)
    # Near its end the run must not get away.
    is_late = num_lines > NUM_STEPS - 2 * SAVE_EVERY
    where = "start" if is_late else draw.choices(["save", "step", "start"], [5, 4, 1])[0]
    if where == "save":
        job.wait_until(lambda: bool(being_written(out) - partials))
        delay = draw.uniform(0, 0.4)
    elif where == "step":
        num_more = draw.randint(1, SAVE_EVERY)
        job.wait_until(lambda: len(read_lines(out)) >= num_lines + num_more)
        delay = draw.uniform(0, 1.0)
    else:
        delay = draw.uniform(1.0, 10.0)
    time.sleep(delay)
    victim = draw.choice([None, *range(NUM_RANKS)])
    job.kill(victim)
    return f"{where} + {delay:.3f} s, {'all' if victim is None else f'rank {victim}'}"


class Job:
    """`aropd train` with its ranks, in a session of their own."""

    def __init__(self, path: Path):
        self.log = path.parent / "job.log"
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                command(path, "--nproc-per-node", str(NUM_RANKS)),
                env=environment(),
                cwd=REPO,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def wait_until(self, is_time: Callable[[], bool], seconds: float = 300) -> None:
        until = time.monotonic() + seconds
        while not is_time():
            if self.process.poll() is not None or time.monotonic() > until:
                pytest.fail(f"the job ended, or hung, before its kill:\n{self.log.read_text()}")
            time.sleep(0.002)

    def kill(self, rank: int | None) -> None:
        """One rank, whose death must end the job by itself; or, with None, all there is."""
        pid = None if rank is None else self._pid_of(rank)
        if pid is None:  # all; or it has not even started
            os.killpg(self.process.pid, signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGKILL)
        assert self.wait(60) != 0, "the job went on without one of its ranks"

    def wait(self, seconds: float) -> int:
        return self.process.wait(seconds)

    def end(self) -> None:
        """Nothing of the job lives on."""
        for pid in self._session():
            os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def _pid_of(self, rank: int) -> int | None:
        for pid in self._session():
            environ = read_bytes(Path(f"/proc/{pid}/environ")).split(b"\0")
            parent = read_bytes(Path(f"/proc/{pid}/status"))
            is_child = f"PPid:\t{self.process.pid}\n".encode() in parent
            if is_child and f"RANK={rank}".encode() in environ:
                return pid
        return None

    def _session(self) -> list[int]:
        """The job's processes, ranks and what ranks have started."""
        found = []
        for entry in Path("/proc").iterdir():
            fields = read_bytes(entry / "stat").rpartition(b")")[2].split()
            if entry.name.isdigit() and fields and int(fields[3]) == self.process.pid:
                found.append(int(entry.name))
        return found


def read_bytes(path: Path) -> bytes:
    """Empty where the process, or the file, is gone."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def being_written(out: Path) -> set[str]:
    return {p.name for p in out.glob("checkpoints/.iter_*.partial") if any(p.iterdir())}


def saved(out: Path) -> list[str]:
    return sorted(p.name for p in out.glob("checkpoints/iter_*"))
