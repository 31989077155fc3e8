"""Ranks of a job as child processes on this machine."""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from types import FrameType

from aropd_mcore import lifetime

SAVED = 75
"""Exit code of a job that stopped early with everything saved (EX_TEMPFAIL of sysexits.h)."""
PASSED_ON = (signal.SIGTERM, signal.SIGUSR1)
"""Signals that this process passes on to the ranks."""
_GRACE_SECONDS = 15.0
"""Time in which the other ranks end by themselves after the first failure."""
_POLL_SECONDS = 0.05


def start_ranks(count: int, arguments: Sequence[str], *, gpus: Sequence[str] | None = None) -> int:
    """Run `aropd` with these arguments as the `count` ranks of a job, and wait for its end.

    SIGTERM, SIGUSR1 and Ctrl-C are passed on to the ranks. If a rank fails, the other ranks end,
    and so do the processes that ranks have started. If this process is killed, the ranks are
    killed (lifetime.py).

    Args:
        gpus: GPUs that the ranks see, one per rank. None: those that this process sees.
    Returns:
        Exit code for this process: that of the rank that failed first, or 1 if a signal killed it.
    """
    import torch.distributed as dist

    # This process has the store, on a port that the system chooses: no rank is special, and no
    # other process can take the port in between.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # pyright: ignore[reportPrivateImportUsage]
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # rank 0 starts none (rendezvous.py)
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    if gpus is not None:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    # Several ranks share this machine's cores.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    ranks: list[subprocess.Popen[bytes]] = []
    passed_on: set[int] = set()

    def pass_on(number: int, _frame: FrameType | None) -> None:
        passed_on.add(number)
        for rank in ranks:
            rank.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in PASSED_ON}
    try:
        for index in range(count):
            command = [sys.executable, "-m", "aropd_mcore.cli", *arguments]
            own = {"RANK": str(index), "LOCAL_RANK": str(index)}
            # In a session of its own, so that its child processes can be found after its end.
            rank = lifetime.start(command, env=environment | own, start_new_session=True)
            ranks.append(rank)
            for number in passed_on:  # signals that came before this rank
                rank.send_signal(number)
        return _exit_code(ranks, passed_on)
    finally:
        _end(ranks)
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit_code(ranks: Sequence[subprocess.Popen[bytes]], passed_on: Collection[int]) -> int:
    """Wait for the ranks to end, and after the first failure for _GRACE_SECONDS."""
    code, until = None, math.inf
    while True:
        ended = [rank.poll() for rank in ranks]
        failed = [i for i, code_i in enumerate(ended) if code_i not in (None, 0, SAVED)]
        if failed and code is None:
            # A rank killed by a signal comes first: the others failed because of its absence.
            first = min(failed, key=lambda i: (ended[i] or 0) >= 0)
            code, until = _meaning(first, ended[first] or 0, passed_on), time.monotonic()
            until += _GRACE_SECONDS
            for rank in ranks:
                rank.terminate()
        if None not in ended or time.monotonic() > until:
            return max(code_i or 0 for code_i in ended) if code is None else code
        time.sleep(_POLL_SECONDS)


def _meaning(rank: int, code: int, passed_on: Collection[int]) -> int:
    """Return the job's exit code for that of a rank, and report a signal."""
    if -code in passed_on:
        # The rank did not handle the signal yet, so there was nothing new to save.
        print(f"aropd: ended by {signal.Signals(-code).name}", file=sys.stderr)
        return SAVED
    if code < 0:
        print(f"aropd: rank {rank} died of signal {-code}", file=sys.stderr)
        return 1
    return code


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """End all processes of the job, after Ctrl-C only when _GRACE_SECONDS have passed."""
    if sys.exc_info()[0] is KeyboardInterrupt:
        until = time.monotonic() + _GRACE_SECONDS
        for rank in ranks:
            rank.send_signal(signal.SIGINT)
        while time.monotonic() < until and any(rank.poll() is None for rank in ranks):
            time.sleep(_POLL_SECONDS)
    for rank in ranks:
        with suppress(ProcessLookupError):  # no process is left
            os.killpg(rank.pid, signal.SIGKILL)
        rank.wait()
