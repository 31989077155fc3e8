"""Per-rank watchdog thread: ends all ranks on the first error or when one hangs.

Without it, the ranks of a job would wait in collectives until the timeout after one rank raised or
hung. The watchdogs communicate through the store with which the process group was initialized:

    claim   rank of the first error. Later errors are considered its consequences.
    end     that rank, its exit code and its error. Published after its traceback is printed.
    ready   number of ranks that have read `end` and, on a hang, written their stacks. Ranks exit
            together, since one of them may host the store.
    stop    signal that one rank received.

The thread runs while the main thread waits in a collective, which releases Python's GIL.
"""

import faulthandler
import json
import multiprocessing
import os
import sys
import threading
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from aropd_mcore import heartbeat
from aropd_mcore.heartbeat import Beat
from aropd_mcore.trainer.stop import Stops

HUNG = 4
"""Exit code of every rank after a hang."""
USER_ERRORS = (ValueError, OSError, FloatingPointError)
"""Errors that the user can fix: exit code 2, without a traceback before the first step."""

_TICK = 1.0
_PATIENCE = {"start": 3.0, "checkpoint": 3.0}
"""Factors on watchdog_minutes for phases that may take longer."""
_OTHERS_SECONDS = 10.0
"""Time to wait for other ranks to print a traceback or to write their stacks."""
_ERROR_SECONDS = 3.0
"""Time to wait for other ranks to read the error."""
_LOST_AFTER = 3
"""Number of consecutive failures of the store after which its process counts as ended."""


class Watchdog:
    """Watchdog of this rank. It runs in the body of a `with` block."""

    def __init__(self, output_dir: Path, stops: Stops, *, minutes: float | None):
        """
        Args:
            output_dir: folder of the run. Stacks are written to its subfolder `stacks`.
            stops: receives the signals of other ranks.
            minutes: time without a heartbeat after which the job counts as hung. None: no limit.
        """
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._stacks = output_dir / "stacks" / f"rank-{self._rank}.txt"
        self._stops = stops
        self._minutes = minutes
        self._is_over = threading.Event()
        self._leaving = threading.Lock()
        """Held by the thread that ends this process."""
        self._store = _own_store() if self._world_size > 1 else None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        heartbeat.beat("start")
        self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _trace: Any) -> None:
        """Stop the watchdog. After an error in a job of several ranks, end this process."""
        if error is not None and not isinstance(error, KeyboardInterrupt) and self._store:
            self._fail(error)
        if error is None:
            dist.barrier()  # The first rank to exit may end the store, which all watchdogs use.
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        num_failures = 0
        while not self._is_over.wait(_TICK):
            end = None
            try:
                if self._store is not None:
                    end = self._poll(self._store)
                num_failures = 0
            except RuntimeError:  # torch's DistError
                num_failures += 1
            last = heartbeat.last_beat()
            if end is not None:
                self._leaving.acquire()
                self._follow(end)
            elif num_failures == _LOST_AFTER:
                self._leaving.acquire()
                self._leave(1, "lost the job's store: the rank or launcher that hosts it has ended")
            elif self._is_silent(last):
                self._leaving.acquire()
                self._hang(last)

    def _poll(self, store: Store) -> dict[str, Any] | None:
        """Return the end of the job, if there is one. Otherwise exchange signals."""
        if store.check(["end"]):
            return json.loads(store.get("end"))
        if self._stops.signal:
            store.set("stop", str(self._stops.signal))
        elif store.check(["stop"]):
            self._stops.signal = int(store.get("stop"))
        return None

    def _is_silent(self, last: Beat) -> bool:
        if self._minutes is None:
            return False
        patience = 60 * self._minutes * _PATIENCE.get(last.phase, 1.0)
        return time.monotonic() - last.at > patience

    # --- an error ---

    def _fail(self, error: BaseException) -> NoReturn:
        """Print the error if it is the first of the job, and exit. Otherwise follow the first."""
        self._leaving.acquire()
        text = f"{type(error).__name__}: {error}"
        end = self._claim()
        if end is not None and end["error"] != text:
            self._follow(end)
        code = 2 if isinstance(error, USER_ERRORS) else 1
        if end is None:  # otherwise another rank has printed the same error
            self._print(self._format(error))
            self._publish(code, text)
        self._leave(code, None)

    def _format(self, error: BaseException) -> str:
        last = heartbeat.last_beat()
        text = ""
        if isinstance(error, USER_ERRORS):
            text = f"aropd: error{f' on rank {self._rank}' if self._rank else ''}: {error}"
            if last.step is None:
                return text
        trace = "".join(traceback.format_exception(error))
        return f"[rank {self._rank}] {last}\n{trace}{text}".rstrip()

    def _claim(self) -> dict[str, Any] | None:
        """Claim to be the first rank that fails. Returns None, or the end of an earlier rank."""
        assert self._store is not None
        try:
            if self._store.compare_set("claim", "", str(self._rank)) == str(self._rank).encode():
                return None
            self._store.wait(["end"], timedelta(seconds=_OTHERS_SECONDS))
            return json.loads(self._store.get("end"))
        except RuntimeError:  # the store has ended
            return None

    def _publish(self, code: int, error: str) -> None:
        if self._store is not None:
            end = {"rank": self._rank, "code": code, "error": error}
            with suppress(RuntimeError):  # the store has ended
                self._store.set("end", json.dumps(end))

    def _follow(self, end: dict[str, Any]) -> NoReturn:
        """Exit because another rank failed or hangs, with the same exit code."""
        if end["code"] == HUNG:
            self._dump(f"rank {end['rank']} hangs")
            self._leave(HUNG, None)
        self._leave(end["code"], f"ended because rank {end['rank']} failed: {end['error']}")

    # --- a hang ---

    def _hang(self, last: Beat) -> NoReturn:
        end = self._claim() if self._store else None
        if end is not None:
            self._follow(end)
        self._dump("the watchdog ends the job (limits.watchdog_minutes)")
        self._publish(HUNG, f"no progress in {last}")
        self._leave(HUNG, None)

    def _dump(self, reason: str) -> None:
        """Write the stacks of this rank's threads to the stacks folder and to stderr."""
        last = heartbeat.last_beat()
        title = f"[rank {self._rank}] {last}: no progress for {time.monotonic() - last.at:.0f} s; "
        title += f"{reason}. Stacks, innermost call first:\n"
        try:
            self._stacks.parent.mkdir(parents=True, exist_ok=True)
            with self._stacks.open("w") as file:
                file.write(title)
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            self._print(self._stacks.read_text())
        except OSError:  # such as a full disk, which may have caused the hang
            self._print(title)
            faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)

    def _leave(self, code: int, reason: str | None) -> NoReturn:
        """End this process without destructors, which would wait for ranks that have ended."""
        if reason is not None:
            self._print(f"[rank {self._rank}] {heartbeat.last_beat()}: {reason}")
        if self._store is not None:
            until = time.monotonic() + (_OTHERS_SECONDS if code == HUNG else _ERROR_SECONDS)
            with suppress(RuntimeError):  # the store has ended
                num_ready = self._store.add("ready", 1)
                while num_ready < self._world_size and time.monotonic() < until:
                    time.sleep(0.1)
                    num_ready = self._store.add("ready", 0)
        for child in multiprocessing.active_children():  # checkpoint writers
            child.kill()
        sys.stdout.flush()
        os._exit(code)

    def _print(self, text: str) -> None:
        # A single write, since ranks share the terminal.
        sys.stderr.write(text.rstrip() + "\n")
        sys.stderr.flush()


def _own_store() -> Store:
    """Open a separate connection to the job's store. The existing one may be blocked in a call."""
    store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=_OTHERS_SECONDS),
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"aropd/{attempt}", store)
