"""usage: aropd_watchdog.py PARENT COMMAND...: run a command that ends when process PARENT does.

PARENT, which has started this, may end in any way, kill -9 included. All that the command has
started in its process group ends with it, and with this process. The standard library alone.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

POLL_SECONDS = 0.2
STOP_SECONDS = 10.0


def main() -> int:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(0))
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        while child.poll() is None and os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        return child.returncode or 0
    finally:
        _end(child)


def _end(child: subprocess.Popen) -> None:
    """Ask the child to go; then end by force what is left of its process group."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a second one must not leave the rest behind
    if child.poll() is None:
        child.terminate()
        with suppress(subprocess.TimeoutExpired):
            child.wait(STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


if __name__ == "__main__":
    sys.exit(main())
