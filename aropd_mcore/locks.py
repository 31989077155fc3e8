"""Locks on files: one process at a time writes a folder or a file.

The locks are flock(2). They end with the process that holds them, however it ends, so a run that
was killed never blocks its successor. flock also works on folders, which POSIX record locks do not.
A forked process shares the lock of its parent; `RunLock` closes the fork's copy, so that a
checkpoint writer in its last write does not keep the lock of a run that is gone.
"""

import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

LOCK = ".lock"
"""The lock file's name in output_dir."""
_PATIENCE = 15.0
"""Seconds that `RunLock` waits for a holder that may be ending: a requeued job starts while the
memory of the killed attempt is still being released."""
_POLL_SECONDS = 0.1


class InUse(ValueError):
    """Another run holds the lock; the message names it."""


def try_lock(descriptor: int) -> bool:
    """Take the lock of an open file or folder, until it is closed or this process ends.

    Returns:
        False if another process holds it. True also on a file system without locks.
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

    The lock file `output_dir/.lock` stays behind. It holds host, process id, start time and Slurm
    job id of the last holder, as JSON.
    """

    def __init__(self, output_dir: Path):
        """Make output_dir if it is missing, and take its lock; wait a while for another holder.

        Raises:
            InUse: another run holds the lock.
        """
        path = output_dir / LOCK
        self._descriptor: int | None = None
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:  # The run cannot write there either, and reports why.
            return
        until = time.monotonic() + _PATIENCE
        while not try_lock(descriptor):
            if time.monotonic() > until:
                os.close(descriptor)
                raise InUse(
                    f"output_dir {output_dir} is in use by another run ({_holder(path)}): wait for "
                    "its end, stop it, or give this run another output_dir"
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
        with suppress(OSError):  # a full disk: the lock holds without its description
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
"""Descriptors of this process's run locks."""


def _release_in_fork() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_release_in_fork)
