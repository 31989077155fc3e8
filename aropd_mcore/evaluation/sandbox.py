"""Sandbox that runs a sample's code and a task's tests.

Two processes per sample (sandbox_child.py), each in its own session: the candidate runs the sample
and the checker runs the tests. They exchange only data. The checker reports the verdict through a
pipe that the sample never holds. Both have an empty environment, limits on CPU time, memory and
file sizes, and may not start processes or threads. Both end by SIGKILL.

If the kernel allows namespaces (for root, or for a user who may create user namespaces), a sample
has no network and sees no other process. The only files are the interpreter and system libraries,
read-only, and a memory disk that disappears with the process. Otherwise `Outcome.not_isolated`
states the reason, and a sample can use the network and the files of the user, or those of the user
`nobody` if the command runs as root.

A sample can still cheat in two ways: by hard-coding answers to tests that its prompt shows, and by
returning objects of its own classes, about which the tests can only ask these objects.
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
    "OPENBLAS_NUM_THREADS": "1",  # numpy would start threads, which the limits forbid
}


@dataclass(frozen=True)
class Limits:
    """Limits of each of a sandbox's two processes."""

    cpu: int = 10
    """CPU time in seconds. It does not depend on other work on the machine."""
    wall: float = 30.0
    """Wall-clock time of both processes in seconds. It ends a sample that sleeps."""
    memory: int = 2 << 30
    """Address space in bytes."""
    disk: int = 64 << 20
    """Size of each file in bytes. If isolated, also the total size of all files."""


@dataclass(frozen=True)
class Program:
    """A sample's code and the tests that grade it."""

    code: str
    """Code of the sample."""
    names: Sequence[str]
    """Functions and classes of the sample that the tests use."""
    tests: str
    """Statements that raise an exception if the sample is wrong."""
    setup: str = ""
    """Imports and helpers of the task. They run before the tests, in the same process."""


@dataclass(frozen=True)
class Outcome:
    """Result of a sandbox."""

    failure: str
    """Reason for the failure. Empty: all tests passed. `time`: a time limit was exceeded. `ended`:
    the sample's process has ended. Otherwise the name of the sample's or the tests' exception."""
    not_isolated: str
    """Reason why the sandbox has no namespaces. Empty if it has."""


def run_tests(program: Program, limits: Limits | None = None, *, isolate: bool = True) -> Outcome:
    """Run a sample and its task's tests in a sandbox.

    A test may pass plain data to the sample, and objects that the sample returned, but no functions
    or objects of the test's own.

    Args:
        limits: None: the defaults.
        isolate: use namespaces if the kernel allows them.
    """
    limits = limits or Limits()
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as other_folder,
    ):
        request, reply = os.pipe(), os.pipe()
        settings = {"limits": asdict(limits), "isolate": isolate, "parent": os.getpid()}
        try:
            candidate = _start(
                "candidate", settings | {"folder": folder}, stdin=request[0], stdout=reply[1]
            )
            pipes = (reply[0], request[1])
            checker = _start(
                "checker", settings | {"folder": other_folder, "pipes": pipes}, pipes=pipes
            )
        finally:
            for end in (*request, *reply):
                os.close(end)
        try:
            verdict, _ = checker.communicate(json.dumps(asdict(program)).encode(), limits.wall)
            outcome = Outcome(**json.loads(verdict)) if verdict else Outcome("time", "")
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
        # -sP: import neither the user's packages nor modules of this folder, which could shadow the
        # standard library's.
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
