"""One thread a rank that sees to it that a job ends as a whole: with its first error, or hung.

A rank that raises leaves the others waiting in collectives, and one that hangs leaves them for an
hour. Ranks tell each other over the store through which the job came together:

    claim   the rank whose error is the job's; whoever fails later only did so because of it
    end     that rank, its exit code and what happened, once its traceback is printed
    heard   how many ranks know, and have written their stacks where the job hangs: they leave
            together, since one of them may have the store
    stop    the signal that one rank has got

The thread runs while the main thread waits in a collective, which lets go of Python's lock.
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
"""Exit code of every rank."""
USER_ERRORS = (ValueError, OSError, FloatingPointError)
"""What people can mend: exit code 2, and before the first step no traceback."""

_TICK = 1.0
_PATIENCE = {"start": 3.0, "checkpoint": 3.0}
"""Phases that may take longer than watchdog_minutes, by how much."""
_OTHERS_SECONDS = 10.0
"""How long the others are waited for: for an error's traceback, and for their stacks."""
_LAST_SECONDS = 3.0
"""How long until they have heard of an error."""
_LOST_AFTER = 3
"""Failures of the store, one after another, after which whoever has it is gone."""


class Watchdog:
    """Of this rank, from `with` to its end."""

    def __init__(self, output_dir: Path, stops: Stops, *, minutes: float | None):
        """
        Args:
            stops: takes the signals that other ranks have got.
            minutes: without a heartbeat, until the job is hung; None: for ever.
        """
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._stacks = output_dir / "stacks" / f"rank-{self._rank}.txt"
        self._stops = stops
        self._minutes = minutes
        self._is_over = threading.Event()
        self._leaving = threading.Lock()
        """Held by the thread that ends this process, once there is one."""
        self._store = _own_store() if self._world_size > 1 else None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        heartbeat.beat("start")
        self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _trace: Any) -> None:
        """Where the run failed and there are other ranks, this one ends here, at once."""
        if error is not None and not isinstance(error, KeyboardInterrupt) and self._store:
            self._fail(error)
        if error is None:
            dist.barrier()  # The store may end with the first that leaves, and is watched by all.
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        num_failures = 0
        while not self._is_over.wait(_TICK):
            end = None
            try:
                if self._store is not None:
                    end = self._hear_others(self._store)
                num_failures = 0
            except RuntimeError:  # torch's DistError
                num_failures += 1
            last = heartbeat.last_beat()
            if end is not None:
                self._leaving.acquire()
                self._follow(end)
            elif num_failures == _LOST_AFTER:
                self._leaving.acquire()
                self._leave(1, "the rank or launcher that holds the job's store is gone")
            elif self._is_silent(last):
                self._leaving.acquire()
                self._hang(last)

    def _hear_others(self, store: Store) -> dict[str, Any] | None:
        """How the job has ended, if it has; and signals go round."""
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
        """Print the error if it is the job's first, and leave; else leave as the first one did."""
        self._leaving.acquire()
        what = f"{type(error).__name__}: {error}"
        end = self._claim()
        if end is not None and end["what"] != what:
            self._follow(end)
        code = 2 if isinstance(error, USER_ERRORS) else 1
        if end is None:  # else a mistake of all ranks alike, said already
            self._print(self._described(error))
            self._tell(code, what)
        self._leave(code, None)

    def _described(self, error: BaseException) -> str:
        last = heartbeat.last_beat()
        text = ""
        if isinstance(error, USER_ERRORS):
            text = f"aropd: error{f' on rank {self._rank}' if self._rank else ''}: {error}"
            if last.step is None:
                return text
        trace = "".join(traceback.format_exception(error))
        return f"[rank {self._rank}] {last}\n{trace}{text}".rstrip()

    def _claim(self) -> dict[str, Any] | None:
        """None where this rank's error is the job's; else what became of the one before it."""
        assert self._store is not None
        try:
            if self._store.compare_set("claim", "", str(self._rank)) == str(self._rank).encode():
                return None
            self._store.wait(["end"], timedelta(seconds=_OTHERS_SECONDS))
            return json.loads(self._store.get("end"))
        except RuntimeError:  # nobody there any more
            return None

    def _tell(self, code: int, what: str) -> None:
        if self._store is not None:
            end = {"rank": self._rank, "code": code, "what": what}
            with suppress(RuntimeError):  # nobody there any more
                self._store.set("end", json.dumps(end))

    def _follow(self, end: dict[str, Any]) -> NoReturn:
        """Leave as another rank has left."""
        if end["code"] == HUNG:
            self._dump(f"rank {end['rank']} hangs")
            self._leave(HUNG, None)
        self._leave(end["code"], f"ended, because rank {end['rank']} failed: {end['what']}")

    # --- a hang ---

    def _hang(self, last: Beat) -> NoReturn:
        end = self._claim() if self._store else None
        if end is not None:
            self._follow(end)
        self._dump("the watchdog ends the job (limits.watchdog_minutes)")
        self._tell(HUNG, f"no progress in {last}")
        self._leave(HUNG, None)

    def _dump(self, why: str) -> None:
        """The stacks of this rank's threads, to their file and to stderr."""
        last = heartbeat.last_beat()
        title = f"[rank {self._rank}] {last}: no progress for {time.monotonic() - last.at:.0f} s; "
        title += f"{why}. Its stacks, the innermost call first:\n"
        try:
            self._stacks.parent.mkdir(parents=True, exist_ok=True)
            with self._stacks.open("w") as file:
                file.write(title)
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            self._print(self._stacks.read_text())
        except OSError:  # a full disk may be why it hangs
            self._print(title)
            faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)

    def _leave(self, code: int, why: str | None) -> NoReturn:
        """End this process without any destructor: they wait for ranks that are gone."""
        if why is not None:
            self._print(f"[rank {self._rank}] {heartbeat.last_beat()}: {why}")
        if self._store is not None:
            until = time.monotonic() + (_OTHERS_SECONDS if code == HUNG else _LAST_SECONDS)
            with suppress(RuntimeError):  # nobody there any more
                num_heard = self._store.add("heard", 1)
                while num_heard < self._world_size and time.monotonic() < until:
                    time.sleep(0.1)
                    num_heard = self._store.add("heard", 0)
        for child in multiprocessing.active_children():  # a checkpoint's writers
            child.kill()
        sys.stdout.flush()
        os._exit(code)

    def _print(self, text: str) -> None:
        # In one write: ranks share the terminal.
        sys.stderr.write(text.rstrip() + "\n")
        sys.stderr.flush()


def _own_store() -> Store:
    """A connection to the job's store of its own: another may be waiting in a call."""
    store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=_OTHERS_SECONDS),
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"aropd/{attempt}", store)
