"""Child processes that end with their parent, whenever and however the parent ends.

The mechanism is Linux's parent-death signal: the kernel sends SIGKILL to the child. This signal
works where a watched pipe or a polling thread fails: before Python runs, while a C call holds the
GIL, in a stopped process, in a hung NCCL call. The signal has four traps, and this module avoids
each:

- The child must request the signal itself. `start` therefore runs this file as a program in the
  child, which requests the signal and then becomes the command (exec keeps the setting). A
  preexec_fn would run Python between fork and exec of a process with threads, which can deadlock.
- If the parent dies before the request, no signal is sent. After the request, the child therefore
  compares its parent's process id with the expected one.
- The signal is tied to the parent's *thread*: a child that was started by a short-lived thread dies
  with that thread. `start` therefore forks from a thread that lasts as long as the process.
- A fork does not inherit the setting. `end_with_parent` therefore applies to later forks as well.

On systems other than Linux, children are not tied to their parent.

This file uses the standard library only: `python lifetime.py PARENT COMMAND...` runs without the
package.
"""

import ctypes
import functools
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_CONNECT_SECONDS = 10.0


def start(command: Sequence[str], **options: Any) -> "subprocess.Popen[bytes]":
    """Start a command that ends with this process, even if this process is killed by SIGKILL.

    The command's own children are not tied: the command must tie them itself.

    Args:
        options: keyword arguments of subprocess.Popen.
    """
    tied = [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]
    return in_lasting_thread(functools.partial(subprocess.Popen[bytes], tied, **options))


def in_lasting_thread(work: Callable[[], T]) -> T:
    """Call `work()` in a thread that lasts as long as this process.

    Children that `work` starts may call `end_with_parent`.
    """
    global _lasting
    if _lasting is None or _lasting[0] != os.getpid():  # a fork has no threads
        _lasting = os.getpid(), ThreadPoolExecutor(1, "lasting")
    return _lasting[1].submit(work).result()


_lasting: tuple[int, ThreadPoolExecutor] | None = None
"""Process id of the thread's owner, and the thread."""


def end_with_parent(parent: int | None = None) -> None:
    """Make the kernel kill this process when its parent ends, and each later fork when this
    process ends.

    A fork from a thread other than the main thread is not tied: it would end with that thread.

    Args:
        parent: expected process id of the parent. This process exits if it already has another
            parent. None: not checked.
    """
    global _ties_forks
    _request_signal()
    if parent is not None and os.getppid() != parent:
        os._exit(1)
    if not _ties_forks:
        _ties_forks = True
        os.register_at_fork(before=_before_fork, after_in_child=_after_fork)


def end_with_launcher() -> None:
    """Call `end_with_parent` at the start of a rank, whose parent is aropd, torchrun or srun's
    script.

    Does nothing in a process that is not a rank. A rank whose launcher has ended exits with 1.
    """
    if "RANK" not in os.environ:
        return
    end_with_parent()
    # The launcher's process id is unknown. If the launcher owns the store and died before the line
    # above, its store is gone too.
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            socket.create_connection(address, _CONNECT_SECONDS).close()
        except ConnectionRefusedError:
            print("aropd: the process that started this rank has ended", file=sys.stderr)
            sys.exit(1)
        except OSError:  # a problem of the network, which the rendezvous reports
            pass


_ties_forks = False
_forking: int | None = None
"""Process id of this process during a fork from its main thread, otherwise None."""


def _before_fork() -> None:
    global _forking
    _forking = os.getpid() if threading.current_thread() is threading.main_thread() else None


def _after_fork() -> None:
    if _forking is not None:
        _request_signal()
        if os.getppid() != _forking:
            os._exit(1)


def _request_signal() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _become(parent: int, command: list[str]) -> NoReturn:
    """Turn this process into a command that ends with process `parent`."""
    end_with_parent(parent)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # ignored by Python, and exec would keep that
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")


if __name__ == "__main__":
    _become(int(sys.argv[1]), sys.argv[2:])
