"""SIGKILL of a process at any moment ends all processes that it has started, and two runs never
write to the same output_dir."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from aropd_mcore.convert.manifest import newest, problems
from tests.conftest import REPO
from tests.support.jobs import Job, command_of, parent_of, read_text
from tests.support.tiny_runs import write_run
from tests.support.training import command, environment, read_lines

pytestmark = pytest.mark.rest

SECONDS = 10.0
"""Number of seconds within which a process must end after its launcher."""
ENDLESS = ["training.num_steps=100000", "checkpoint.save_every_steps=1"]


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("left"), checkpoint={"keep_last": 1})


# --- ranks and their child processes ---


def has_started(job: Job) -> bool:
    return job.pid_of(0) is not None


def has_imported_torch(job: Job, rank: int = 0) -> bool:
    pid = job.pid_of(rank)
    return pid is not None and "libtorch_cpu" in read_text(Path(f"/proc/{pid}/maps"))


def is_in_rendezvous(job: Job) -> bool:
    """Return whether rank 0 is connected to the job's store, and waits for rank 1. Stops rank 1."""
    pid, other = job.pid_of(0), job.pid_of(1)
    if (
        pid is None
        or other is None
        or not (has_imported_torch(job, 0) and has_imported_torch(job, 1))
    ):
        return False
    os.kill(other, signal.SIGSTOP)
    port = dict(line.partition("=")[::2] for line in job.processes()[pid])["MASTER_PORT"]
    connections = psutil.Process(pid).net_connections("tcp")
    return any(c.raddr and c.raddr.port == int(port) for c in connections)


def is_loading(job: Job) -> bool:
    """Return whether rank 0 has the lock of output_dir, which it takes before it loads models."""
    locks = [
        json.loads(read_text(lock) or "{}") for lock in job.log.parent.glob("is_loading-*/.lock")
    ]
    return any(lock.get("pid") == job.pid_of(0) for lock in locks)


def is_saving(job: Job) -> bool:
    """Return whether a checkpoint's writer process is running. Stops it, so it cannot finish.

    The writer must be stopped after it has requested the parent-death signal, which it does before
    it lowers its priority.
    """
    ranks = {job.pid_of(0), job.pid_of(1)}
    for pid in job.processes():
        is_fork = parent_of(pid) in ranks and command_of(pid) == command_of(parent_of(pid))
        if not (is_fork and "cli train" in command_of(pid)):
            continue
        with suppress(ProcessLookupError):  # the process has ended
            if os.getpriority(os.PRIO_PROCESS, pid) > os.getpriority(os.PRIO_PROCESS, 0):
                os.kill(pid, signal.SIGSTOP)
                return True
    return False


MOMENTS: list[tuple[Callable[[Job], bool], bool]] = [
    (has_started, False),
    (has_imported_torch, False),
    (is_in_rendezvous, False),
    (is_loading, False),
    (has_started, True),
    (is_in_rendezvous, True),
]


@pytest.mark.parametrize(("moment", "torchrun"), MOMENTS)
def test_sigkill_of_the_launcher_ends_every_rank(path, moment, torchrun):
    out = path.parent / f"{moment.__name__}-{torchrun}"
    job = Job(path, 2, f"output_dir={out}", *ENDLESS, torchrun=torchrun)
    try:
        job.wait_until(lambda: moment(job))
        os.kill(job.process.pid, signal.SIGKILL)
        job.process.wait()
        job.check_nothing_is_left()
    finally:
        job.end()


def test_sigkill_of_the_launcher_during_a_save_ends_the_writers_and_the_run_resumes(path):
    out = path.parent / "saves"
    job = Job(path, 2, f"output_dir={out}", *ENDLESS)
    try:
        job.wait_until(lambda: newest(out / "checkpoints") is not None and is_saving(job))
        started = [command_of(pid) for pid in job.processes()]
        assert any("multiprocessing.spawn" in command for command in started), started
        os.kill(job.process.pid, signal.SIGKILL)
        num_steps = len(read_lines(out)) + 2
        # The next job starts without waiting for the end of the first.
        again = Job(path, 2, f"output_dir={out}", f"training.num_steps={num_steps}")
        try:
            job.check_nothing_is_left()
            assert again.process.wait(120) == 0, again.log.read_text()
        finally:
            again.end()
    finally:
        job.end()
    assert "resuming at step" in again.log.read_text()
    assert [line["step"] for line in read_lines(out)] == list(range(num_steps))
    last = newest(out / "checkpoints")
    assert last is not None and int(last.name[5:]) == num_steps and problems(last) == []
    assert not list(out.glob("checkpoints/.iter*")), "expected no folder of the killed writer"


# --- servers and graders ---

SERVER = """
import os, sys, time
from pathlib import Path
from aropd_mcore.rollout.vllm_process import ServerProcess
script = "trap '' TERM; sleep 600 & sleep 600"
ServerProcess(["sh", "-c", script], os.environ, Path(sys.argv[1]))
time.sleep(600)
"""
"""Program that starts a server. The server ignores SIGTERM and has a child process."""

GRADER = """
import threading, time
from aropd_mcore.evaluation.grade import Graders
from aropd_mcore.evaluation.sandbox import Program, run_tests
from aropd_mcore.evaluation.tasks import MathAnswer

def sleep(isolate):
    run_tests(Program("import time; time.sleep(600)", [], ""), isolate=isolate)

for isolate in (True, False):
    threading.Thread(target=sleep, args=(isolate,)).start()
Graders(1).grade("The answer is \\\\boxed{1 + 1}.", MathAnswer("2"))
print("isolated" if not run_tests(Program("", [], "")).not_isolated else "", flush=True)
time.sleep(600)
"""


def wait_for_descendants(
    program: subprocess.Popen, number: int, matches: Callable[[str], bool] = lambda command: True
) -> list[psutil.Process]:
    """Wait until a program has `number` descendants with a matching command.

    Returns:
        All descendants, ordered by process id.
    """
    until, descendants = time.monotonic() + 60, []
    while sum(matches(command_of(process.pid)) for process in descendants) != number:
        assert time.monotonic() < until and program.poll() is None, descendants
        time.sleep(0.05)
        descendants = psutil.Process(program.pid).children(recursive=True)
    return sorted(descendants, key=lambda process: process.pid)


def survivors(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Return the processes that still run after SECONDS."""
    until = time.monotonic() + SECONDS
    while alive := [process for process in processes if is_running(process)]:
        if time.monotonic() > until:
            break
        time.sleep(0.05)
    return alive


def is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end(program: subprocess.Popen, processes: list[psutil.Process]) -> None:
    for process in [*filter(is_running, processes), program]:
        process.kill()
    program.wait()


def test_sigkill_of_any_process_of_a_server_ends_all_its_processes(tmp_path):
    victims = ("the run", "the first watchdog", "the second watchdog", "the server")
    programs = [
        subprocess.Popen([sys.executable, "-c", SERVER, str(tmp_path / f"log-{number}")], cwd=REPO)
        for number in range(len(victims))
    ]
    families = [
        wait_for_descendants(program, 2, lambda command: command == "sleep 600")
        for program in programs
    ]
    try:
        for number, program in enumerate(programs):
            [program, *families[number]][number].kill()
        alive = {victim: survivors(f) for victim, f in zip(victims, families, strict=True)}
        assert not any(alive.values()), alive
    finally:
        for program, processes in zip(programs, families, strict=True):
            end(program, processes)


def test_sigkill_of_the_grader_ends_its_math_and_sandbox_processes(tmp_path):
    program = subprocess.Popen([sys.executable, "-c", GRADER], cwd=REPO, stdout=subprocess.PIPE)
    assert program.stdout is not None
    # With namespaces, each process of a sandbox has another process that waits for it.
    num_waiting = 2 if program.stdout.readline() == b"isolated\n" else 0
    children = wait_for_descendants(program, 1 + 2 * 2 + num_waiting)
    try:
        [math] = [child for child in children if "math_child" in " ".join(child.cmdline())]
        math.suspend()  # as in a C call, where it does not notice that its pipe is closed
        program.kill()
        assert survivors(children) == []
    finally:
        end(program, children)
        program.stdout.close()


# --- two runs with one output_dir ---


def test_second_run_on_an_output_dir_is_refused_and_the_first_completes(path):
    out, num_steps = path.parent / "shared", 6
    overrides = [f"output_dir={out}", f"training.num_steps={num_steps}"]
    first = Job(path, 2, *overrides, "checkpoint.save_every_steps=2")
    try:
        first.wait_until(lambda: len(read_lines(out)) >= 1)
        ranks = [first.pid_of(0), first.pid_of(1)]
        for rank in ranks:
            os.kill(rank, signal.SIGSTOP)  # the first run must not end before the second starts
        files = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
        holder = json.loads((out / ".lock").read_text())
        assert holder["pid"] == ranks[0]
        second = subprocess.run(
            command(path, *overrides, "--nproc-per-node", "2"),
            env=environment(),
            cwd=REPO,
            capture_output=True,
            text=True,
        )
        assert second.returncode == 2, second.stderr
        assert second.stdout == "" and second.stderr.count("\n") == 1
        assert second.stderr.startswith(
            f"aropd: error: output_dir {out} is in use by another run (host {holder['host']}, "
            f"pid {ranks[0]}, since {holder['since']}"
        )
        assert {file: file.stat().st_mtime_ns for file in out.rglob("*")} == files
        for rank in ranks:
            os.kill(rank, signal.SIGCONT)
        assert first.process.wait(120) == 0, first.log.read_text()
    finally:
        first.end()
    assert [line["step"] for line in read_lines(out)] == list(range(num_steps))
    last = newest(out / "checkpoints")
    assert last is not None and int(last.name[5:]) == num_steps and problems(last) == []
