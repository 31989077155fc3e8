"""SIGKILL of a process at any moment leaves none of the processes that it has started, and two runs
never write to one output_dir."""

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
"""That a process may outlive its launcher."""
ENDLESS = ["training.num_steps=100000", "checkpoint.save_every_steps=1"]


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("left"), checkpoint={"keep_last": 1})


# --- ranks and what they start ---


def has_started(job: Job) -> bool:
    return job.pid_of(0) is not None


def imports(job: Job, rank: int = 0) -> bool:
    pid = job.pid_of(rank)
    return pid is not None and "libtorch_cpu" in read_text(Path(f"/proc/{pid}/maps"))


def waits_in_rendezvous(job: Job) -> bool:
    """Rank 0 is connected to the job's store, where rank 1, which is stopped, never comes."""
    pid, other = job.pid_of(0), job.pid_of(1)
    if pid is None or other is None or not (imports(job, 0) and imports(job, 1)):
        return False
    os.kill(other, signal.SIGSTOP)
    port = dict(line.partition("=")[::2] for line in job.processes()[pid])["MASTER_PORT"]
    connections = psutil.Process(pid).net_connections("tcp")
    return any(c.raddr and c.raddr.port == int(port) for c in connections)


def loads(job: Job) -> bool:
    """Rank 0 has the lock of output_dir, which it takes right before it reads data and models."""
    locks = [json.loads(read_text(lock) or "{}") for lock in job.log.parent.glob("loads-*/.lock")]
    return any(lock.get("pid") == job.pid_of(0) for lock in locks)


def saves(job: Job) -> bool:
    """A checkpoint's writing process is under way, and is stopped, so that it cannot just end.

    A process that is stopped before it has asked for the parent-death signal would live on. The
    writer asks before it lowers its priority.
    """
    ranks = {job.pid_of(0), job.pid_of(1)}
    for pid in job.processes():
        is_fork = parent_of(pid) in ranks and command_of(pid) == command_of(parent_of(pid))
        if not (is_fork and "cli train" in command_of(pid)):
            continue
        with suppress(ProcessLookupError):  # it has ended
            if os.getpriority(os.PRIO_PROCESS, pid) > os.getpriority(os.PRIO_PROCESS, 0):
                os.kill(pid, signal.SIGSTOP)
                return True
    return False


MOMENTS: list[tuple[Callable[[Job], bool], bool]] = [
    (has_started, False),
    (imports, False),
    (waits_in_rendezvous, False),
    (loads, False),
    (has_started, True),
    (waits_in_rendezvous, True),
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
        job.wait_until(lambda: newest(out / "checkpoints") is not None and saves(job))
        started = [command_of(pid) for pid in job.processes()]
        assert any("multiprocessing.spawn" in command for command in started), started
        os.kill(job.process.pid, signal.SIGKILL)
        num_steps = len(read_lines(out)) + 2
        again = Job(path, 2, f"output_dir={out}", f"training.num_steps={num_steps}")  # at once
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
    assert not list(out.glob("checkpoints/.iter*")), "the killed writer's folder"


# --- servers and graders ---

SERVER = """
import os, sys, time
from pathlib import Path
from aropd_mcore.rollout.vllm_process import ServerProcess
script = "trap '' TERM; sleep 600 & sleep 600"
ServerProcess(["sh", "-c", script], os.environ, Path(sys.argv[1]))
time.sleep(600)
"""
"""A run with a server that ignores SIGTERM and has a process of its own."""

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


def family(
    program: subprocess.Popen, number: int, of: Callable[[str], bool] = lambda command: True
) -> list[psutil.Process]:
    """The processes below a program, once there are so many `of` a command; the oldest first."""
    until, found = time.monotonic() + 60, []
    while sum(of(command_of(process.pid)) for process in found) != number:
        assert time.monotonic() < until and program.poll() is None, found
        time.sleep(0.05)
        found = psutil.Process(program.pid).children(recursive=True)
    return sorted(found, key=lambda process: process.pid)


def left(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still run after the seconds that they may."""
    until = time.monotonic() + SECONDS
    while alive := [process for process in processes if runs(process)]:
        if time.monotonic() > until:
            break
        time.sleep(0.05)
    return alive


def runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end(program: subprocess.Popen, processes: list[psutil.Process]) -> None:
    for process in [*filter(runs, processes), program]:
        process.kill()
    program.wait()


def test_sigkill_of_any_one_process_ends_a_server_with_all_that_it_has_started(tmp_path):
    victims = ("the run", "the first watchdog", "the second watchdog", "the server")
    programs = [
        subprocess.Popen([sys.executable, "-c", SERVER, str(tmp_path / f"log-{number}")], cwd=REPO)
        for number in range(len(victims))
    ]
    families = [family(program, 2, lambda command: command == "sleep 600") for program in programs]
    try:
        for number, program in enumerate(programs):
            [program, *families[number]][number].kill()
        found = {victim: left(f) for victim, f in zip(victims, families, strict=True)}
        assert not any(found.values()), found
    finally:
        for program, processes in zip(programs, families, strict=True):
            end(program, processes)


def test_sigkill_of_the_grader_ends_its_math_and_sandbox_processes(tmp_path):
    program = subprocess.Popen([sys.executable, "-c", GRADER], cwd=REPO, stdout=subprocess.PIPE)
    assert program.stdout is not None
    # Within namespaces, each process of a sandbox has one that waits for it.
    num_waiting = 2 if program.stdout.readline() == b"isolated\n" else 0
    children = family(program, 1 + 2 * 2 + num_waiting)
    try:
        [math] = [child for child in children if "math_child" in " ".join(child.cmdline())]
        math.suspend()  # as in a C call: it does not read that its pipe has ended
        program.kill()
        assert left(children) == []
    finally:
        end(program, children)
        program.stdout.close()


# --- two runs ---


def test_a_second_run_on_one_output_dir_is_refused_and_the_first_is_unharmed(path):
    out, num_steps = path.parent / "shared", 6
    overrides = [f"output_dir={out}", f"training.num_steps={num_steps}"]
    first = Job(path, 2, *overrides, "checkpoint.save_every_steps=2")
    try:
        first.wait_until(lambda: len(read_lines(out)) >= 1)
        ranks = [first.pid_of(0), first.pid_of(1)]
        for rank in ranks:
            os.kill(rank, signal.SIGSTOP)  # so that it does not end first
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
