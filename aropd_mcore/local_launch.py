"""A job's ranks as processes of this machine, started and watched by `aropd train` itself."""

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
"""Exit code of a job that has stopped early, with everything saved: sysexits.h's EX_TEMPFAIL."""
PASSED_ON = (signal.SIGTERM, signal.SIGUSR1)
_GRACE_SECONDS = 15.0
"""How long the ranks that are left have after the first failure: they end by themselves."""
_LOOK_SECONDS = 0.05


def start_ranks(count: int, arguments: Sequence[str]) -> int:
    """Run `aropd` with these arguments as the `count` ranks of a job, and wait for its end.

    SIGTERM, SIGUSR1 and Ctrl-C are passed on to the ranks. If a rank fails, the other ranks end,
    and so do the processes that ranks have started. If this process is killed, the ranks are
    killed (lifetime.py).

    Returns:
        Exit code for this process: that of the rank that failed first, or 1 if a signal killed it.
    """
    import torch.distributed as dist

    # The store lives here, on a port that the system has chosen: no rank is special, and no port
    # is taken by another in between.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # pyright: ignore[reportPrivateImportUsage]
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # torch/distributed/rendezvous.py: rank 0 has none
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
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
            # A session of its own: the processes that it has started can be found after its end.
            rank = lifetime.start(command, env=environment | own, start_new_session=True)
            ranks.append(rank)
            for number in passed_on:  # before this rank was there
                rank.send_signal(number)
        return _exit_code(ranks, passed_on)
    finally:
        _end(ranks)
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit_code(ranks: Sequence[subprocess.Popen[bytes]], passed_on: Collection[int]) -> int:
    """Wait for the ranks to end; only so long once one has failed."""
    code, until = None, math.inf
    while True:
        ended = [rank.poll() for rank in ranks]
        failed = [i for i, found in enumerate(ended) if found not in (None, 0, SAVED)]
        if failed and code is None:
            # Who died of a signal did so first: the others only met its absence.
            first = min(failed, key=lambda i: (ended[i] or 0) >= 0)
            code, until = _meaning(first, ended[first] or 0, passed_on), time.monotonic()
            until += _GRACE_SECONDS
            for rank in ranks:
                rank.terminate()
        if None not in ended or time.monotonic() > until:
            return max(found or 0 for found in ended) if code is None else code
        time.sleep(_LOOK_SECONDS)


def _meaning(rank: int, code: int, passed_on: Collection[int]) -> int:
    """A rank's exit code as the job's; a signal is said and explained."""
    if -code in passed_on:
        # Before it listened to that signal: there was nothing new to save.
        print(f"aropd: ended by {signal.Signals(-code).name}", file=sys.stderr)
        return SAVED
    if code < 0:
        print(f"aropd: rank {rank} died of signal {-code}", file=sys.stderr)
        return 1
    return code


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Nothing of the job lives on; after Ctrl-C the ranks have a while."""
    if sys.exc_info()[0] is KeyboardInterrupt:
        until = time.monotonic() + _GRACE_SECONDS
        for rank in ranks:
            rank.send_signal(signal.SIGINT)
        while time.monotonic() < until and any(rank.poll() is None for rank in ranks):
            time.sleep(_LOOK_SECONDS)
    for rank in ranks:
        with suppress(ProcessLookupError):  # nobody is left
            os.killpg(rank.pid, signal.SIGKILL)
        rank.wait()
