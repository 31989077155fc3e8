"""usage: aropd_watchdog.py PARENT SCRATCH COMMAND...: run a command that ends when PARENT does.

PARENT is a process. If it ends first, the folder SCRATCH is removed ("": none).

Two watchdogs, so that SIGKILL of any one process leaves nothing behind:

    first     the process that PARENT has started; watches PARENT and the second watchdog
    second    child of the first, in a session of its own, in which it starts the command; watches
              the command and the first watchdog

When a watched process ends, both watchdogs end, and so do all processes of that session: the
command and its descendants. vLLM's engine processes do not end by themselves when their server is
killed. A parent-death signal (aropd_mcore/lifetime.py) would reach only the command. It would also
come too early, because PARENT starts servers from threads that end before PARENT does.

Needs only the standard library.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

POLL_SECONDS = 0.2
STOP_SECONDS = 5.0
"""Time for the command to end by itself. Together with the polls it is well below the ten seconds
for which a process may outlive PARENT."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def main() -> int:
    parent, scratch, command = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    for number in _SIGNALS:
        signal.signal(number, lambda *_: sys.exit(0))
    first = os.getpid()
    second = os.fork()
    if second == 0:
        os.setsid()
        return run(command, first)
    return guard(second, parent, scratch)


def run(command: list[str], first: int) -> int:
    """Be the second watchdog; return the command's exit code, or 0 if it was ended."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)
    try:
        while child.poll() is None and os.getppid() == first:
            time.sleep(POLL_SECONDS)
        return child.returncode or 0
    finally:
        _ignore_signals()
        if child.poll() is None:
            child.terminate()
            with suppress(subprocess.TimeoutExpired):
                child.wait(STOP_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def guard(second: int, parent: int, scratch: str) -> int:
    """Be the first watchdog; return the exit code of the second one."""
    code = None
    try:
        while code is None and os.getppid() == parent:
            code = _wait(second, POLL_SECONDS)
        return code or 0
    finally:
        _ignore_signals()
        if code is None:
            os.kill(second, signal.SIGTERM)
            code = _wait(second, STOP_SECONDS + 1)
        kill_session(second)
        if code is None:
            os.waitpid(second, 0)
        if scratch and os.getppid() != parent:
            shutil.rmtree(scratch, ignore_errors=True)


def _wait(process: int, seconds: float) -> int | None:
    """Return the exit code of a child, or None if it still runs."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(POLL_SECONDS / 4)
    return None


def kill_session(leader: int) -> None:
    """Kill every process group of a session, even if its leader has ended."""
    for name in os.listdir("/proc"):
        with suppress(ValueError, ProcessLookupError):
            if os.getsid(int(name)) == leader:
                os.killpg(os.getpgid(int(name)), signal.SIGKILL)


def _ignore_signals() -> None:
    """Ignore further signals, which would interrupt the cleanup."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main())
