"""Progress in bytes with the remaining time: a bar on a terminal, occasional lines in a log."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

_SECONDS_BETWEEN_LINES = 30.0


class Advance(Protocol):
    def __call__(self, num_bytes: int, /) -> None:
        """Report that `num_bytes` more bytes are done."""


@contextmanager
def progress(label: str, total_bytes: int) -> Iterator[Advance]:
    """Show the progress of the block on stderr, relative to total_bytes."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(label, total_bytes)
        return
    columns = (
        TextColumn(label),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(label, total=total_bytes)
        yield lambda num_bytes: bar.advance(task, num_bytes)


class _Lines:
    """Progress as lines: one line per 30 seconds at most, and one at the end."""

    def __init__(self, label: str, total_bytes: int):
        self.label, self.total = label, total_bytes
        self.done = 0
        self.lock = threading.Lock()
        self.start = self.last = time.monotonic()

    def __call__(self, num_bytes: int, /) -> None:
        with self.lock:  # several threads report progress
            self.done += num_bytes
            now = time.monotonic()
            if now - self.last < _SECONDS_BETWEEN_LINES and self.done < self.total:
                return
            self.last = now
        elapsed = max(now - self.start, 1e-9)
        left = elapsed * (self.total - self.done) / max(self.done, 1)
        print(
            f"{self.label}: {self.done / 1e9:.2f} of {self.total / 1e9:.2f} GB in {elapsed:.0f} s, "
            f"{left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )
