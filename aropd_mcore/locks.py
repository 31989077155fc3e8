"""File locks: one process at a time writes a folder or a file.

The locks are flock(2). A lock ends with the process that holds it, however the process ends, so a
killed run never blocks its successor. flock also works on folders, unlike POSIX record locks. A
forked process shares its parent's lock. `RunLock` closes the fork's copy, so that a checkpoint
writer that is still writing does not hold the lock of a run that has ended.
"""

import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

LOCK = ".lock"
"""Name of the lock file in output_dir."""
_PATIENCE = 15.0
"""Seconds that `RunLock` waits for another holder: a requeued job can start while the memory of the
killed attempt is still being released."""
_POLL_SECONDS = 0.1


class InUse(ValueError):
    """Error: another run holds the lock. The message describes that run."""


def try_lock(descriptor: int) -> bool:
    """Lock an open file or folder until it is closed or this process ends.

    Returns:
        False if another process holds the lock. True also on a file system without locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


class RunLock:
    """The lock of a run's output_dir, from its creation to `close` or the end of the process.

    The lock file `output_dir/.lock` is not removed. It contains host, process id, start time and
    Slurm job id of the last holder, as JSON.
    """

    def __init__(self, output_dir: Path):
        """Create output_dir if it is missing, and lock it. Waits up to 15 s for another holder.

        Raises:
            InUse: another run holds the lock.
        """
        path = output_dir / LOCK
        self._descriptor: int | None = None
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:  # The run cannot write there either, and will report the reason.
            return
        until = time.monotonic() + _PATIENCE
        while not try_lock(descriptor):
            if time.monotonic() > until:
                os.close(descriptor)
                raise InUse(
                    f"output_dir {output_dir} is in use by another run ({_holder(path)}): wait "
                    "until that run ends, stop it, or choose another output_dir"
                )
            time.sleep(_POLL_SECONDS)
        self._descriptor = descriptor
        _held.add(descriptor)
        holder = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        if "SLURM_JOB_ID" in os.environ:
            holder["Slurm job"] = os.environ["SLURM_JOB_ID"]
        with suppress(OSError):  # on a full disk, the lock works without its description
            os.truncate(descriptor, 0)
            os.write(descriptor, json.dumps(holder).encode() + b"\n")

    def close(self) -> None:
        """Release the lock."""
        if self._descriptor is not None:
            _held.discard(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None


def _holder(path: Path) -> str:
    with suppress(OSError, ValueError, AttributeError):
        return ", ".join(f"{key} {value}" for key, value in json.loads(path.read_text()).items())
    return "holder unknown"


_held: set[int] = set()
"""File descriptors of this process's run locks."""


def _release_in_fork() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_release_in_fork)
