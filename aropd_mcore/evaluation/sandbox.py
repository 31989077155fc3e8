"""A sample's code and a task's tests, run where neither can do harm.

Two processes a sample, in sessions of their own (sandbox_child.py): the checker runs the tests, the
candidate the sample, and only data goes between them; the verdict is the checker's, over a pipe
that the sample never holds. Each has an empty environment, limits on processor time, memory and
file sizes, and no right to start processes or threads; it ends by SIGKILL.

Where the kernel allows namespaces (root, or a user who may have user namespaces), there is no
network, no other process, and no file but the interpreter and system libraries, read-only, and a
memory disk that goes with the process. Where it does not, `Outcome.not_isolated` says why: a sample
then has the network and files of the user, or of `nobody` where the user is root.

What remains to a sample that cheats: answers that it knows from tests which its prompt shows, and
objects of its own classes, which tests can only ask about themselves.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

_CHILD = Path(__file__).with_name("sandbox_child.py")
_ENVIRONMENT = {
    "PYTHONHASHSEED": "0",  # a sample's verdict must not depend on the order of its sets
    "OPENBLAS_NUM_THREADS": "1",  # numpy would start threads, and may not
}


@dataclass(frozen=True)
class Limits:
    """Of each of a sandbox's two processes."""

    cpu: int = 10
    """Seconds of processor time, which other work on the machine does not change."""
    wall: float = 30.0
    """Seconds, for both: of a sample that sleeps."""
    memory: int = 2 << 30
    """Bytes of address space."""
    disk: int = 64 << 20
    """Bytes of a file; where it is isolated, of all files."""


@dataclass(frozen=True)
class Program:
    """What is run."""

    code: str
    """The sample's."""
    names: Sequence[str]
    """What the tests know of it: the functions and classes that they call."""
    tests: str
    """Statements that raise where the sample is wrong."""
    setup: str = ""
    """Run before the tests, beside them: imports and helpers of the task's own."""


@dataclass(frozen=True)
class Outcome:
    failure: str
    """Nothing: all tests passed. `time`: over a limit; `ended`: the sample's process is gone; else
    the name of the exception, of the sample or the tests."""
    not_isolated: str
    """Nothing, or why the sandbox has no namespaces."""


def run_tests(program: Program, limits: Limits | None = None, *, isolate: bool = True) -> Outcome:
    """Whether a sample passes its task's tests.

    A test may hand plain data to the sample, and objects that it got from it, but no functions or
    objects of its own.

    Args:
        isolate: by namespaces, where the kernel allows them.
    """
    limits = limits or Limits()
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as other_folder,
    ):
        request, answered = os.pipe(), os.pipe()
        settings = {"limits": asdict(limits), "isolate": isolate, "parent": os.getpid()}
        try:
            candidate = _start(
                "candidate", settings | {"folder": folder}, stdin=request[0], stdout=answered[1]
            )
            pipes = (answered[0], request[1])
            checker = _start(
                "checker", settings | {"folder": other_folder, "pipes": pipes}, pipes=pipes
            )
        finally:
            for end in (*request, *answered):
                os.close(end)
        try:
            said, _ = checker.communicate(json.dumps(asdict(program)).encode(), limits.wall)
            outcome = Outcome(**json.loads(said)) if said else Outcome("time", "")
            if outcome.failure == "ended" and _ran_out_of_time(candidate):
                outcome = Outcome("time", outcome.not_isolated)
        except subprocess.TimeoutExpired:
            outcome = Outcome("time", "")
        finally:
            for process in (candidate, checker):
                _kill(process)
    return outcome


def _start(
    role: str,
    settings: dict,
    *,
    stdin: int = subprocess.PIPE,
    stdout: int = subprocess.PIPE,
    pipes: Sequence[int] = (),
) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        # Neither the user's packages nor this folder, whose names would hide the library's.
        [sys.executable, "-sP", str(_CHILD), role, json.dumps(settings)],
        stdin=stdin,
        stdout=stdout,
        stderr=subprocess.DEVNULL,
        pass_fds=pipes,
        env=_ENVIRONMENT,
        cwd="/",
        start_new_session=True,
    )


def _ran_out_of_time(process: "subprocess.Popen[bytes]") -> bool:
    with suppress(subprocess.TimeoutExpired):
        return process.wait(1) in (-signal.SIGKILL, -signal.SIGXCPU)
    return False


def _kill(process: "subprocess.Popen[bytes]") -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe:
            pipe.close()
