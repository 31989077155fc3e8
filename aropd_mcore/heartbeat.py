"""Progress of this process in the run, for the watchdog.

The state is global, one per process, so code deep in the model can report progress without an
extra argument. A beat is two assignments, cheap enough for every token and microbatch.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Beat:
    """The last reported progress."""

    phase: str
    """Phase of the run: `start`, a phase of a step (trainer.step), `metrics` or `checkpoint`."""
    step: int | None
    """Current step. None before the first one."""
    at: float
    """Time of the report, by time.monotonic()."""

    def __str__(self) -> str:
        return f"step {'-' if self.step is None else self.step}, phase {self.phase}"


_last = Beat("start", None, time.monotonic())


def beat(phase: str | None = None, step: int | None = None) -> None:
    """Report progress. A phase or step that is None keeps its last reported value."""
    global _last
    last = _last
    _last = Beat(phase or last.phase, last.step if step is None else step, time.monotonic())


@contextmanager
def beating(interval: float) -> Iterator[None]:
    """Context in which a thread reports progress.

    It is for waits whose end depends on the progress of another process only, if that process has a
    watchdog of its own.

    Args:
        interval: seconds between two reports.
    """
    is_over = threading.Event()

    def run() -> None:
        while not is_over.wait(interval):
            beat()

    thread = threading.Thread(target=run, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def last_beat() -> Beat:
    return _last
