"""Child processes that end with their parent, at any moment and however the parent ends.

The mechanism is Linux's parent-death signal: the kernel sends SIGKILL to the child. It works where
a watched pipe or a polling thread does not: before Python runs, while a C call holds the GIL, in a
stopped process, in a hung NCCL call. The signal has four traps, and this module avoids each:

- The child must ask for the signal itself. `start` therefore runs this file as a program in the
  child, which asks and then becomes the command (exec keeps the setting). A preexec_fn would run
  Python between fork and exec of a process that has threads, which can deadlock.
- A parent that dies before the child has asked sends nothing. The child therefore compares its
  parent's process id with the expected one after it has asked.
- The kernel means the parent's *thread*: a child that a short-lived thread has started dies with
  that thread. `start` therefore forks from a thread that lasts as long as the process.
- A fork does not inherit the setting. `end_with_parent` therefore applies to later forks as well.

On systems other than Linux, children are not tied to their parent.

The standard library alone: `python lifetime.py PARENT COMMAND...` runs without the package.
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

    The command's own children are not included; they need the same care.

    Args:
        options: as subprocess.Popen's.
    """
    tied = [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]
    return in_lasting_thread(functools.partial(subprocess.Popen[bytes], tied, **options))


def in_lasting_thread(work: Callable[[], T]) -> T:
    """Call `work()` in a thread that lasts as long as this process: children that it starts may
    call `end_with_parent`."""
    global _lasting
    if _lasting is None or _lasting[0] != os.getpid():  # a fork has no threads
        _lasting = os.getpid(), ThreadPoolExecutor(1, "lasting")
    return _lasting[1].submit(work).result()


_lasting: tuple[int, ThreadPoolExecutor] | None = None
"""The process that has the thread, and the thread."""


def end_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when its parent ends, and each later fork when this one
    does.

    A fork from a thread other than the main thread is not tied: it would end with that thread.

    Args:
        parent: process id of the parent; this process exits if another one is its parent by now.
            None: not compared.
    """
    global _ties_forks
    _ask_for_signal()
    if parent is not None and os.getppid() != parent:
        os._exit(1)
    if not _ties_forks:
        _ties_forks = True
        os.register_at_fork(before=_before_fork, after_in_child=_after_fork)


def end_with_launcher() -> None:
    """`end_with_parent` for a rank, first thing: its parent is `aropd`, torchrun or srun's script.

    Does nothing in a process that is no rank. A rank whose launcher is gone already exits with 1.
    """
    if "RANK" not in os.environ:
        return
    end_with_parent()
    # The launcher's process id is not known here. A launcher that died before the line above has
    # taken its store with it, where the store is the launcher's.
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            socket.create_connection(address, _CONNECT_SECONDS).close()
        except ConnectionRefusedError:
            print("aropd: the process that started this rank is gone", file=sys.stderr)
            sys.exit(1)
        except OSError:  # the network's problem, which the rendezvous reports
            pass


_ties_forks = False
_forking: int | None = None
"""This process's id during a fork from its main thread."""


def _before_fork() -> None:
    global _forking
    _forking = os.getpid() if threading.current_thread() is threading.main_thread() else None


def _after_fork() -> None:
    if _forking is not None:
        _ask_for_signal()
        if os.getppid() != _forking:
            os._exit(1)


def _ask_for_signal() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _become(parent: int, command: list[str]) -> NoReturn:
    """Turn this process into a command that ends with process `parent`."""
    end_with_parent(parent)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and exec passes that on
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")


if __name__ == "__main__":
    _become(int(sys.argv[1]), sys.argv[2:])
