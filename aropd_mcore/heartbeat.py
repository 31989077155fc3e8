"""Where this process stands in the run, and since when: for whoever watches it from outside.

One process has one heart, as it has one log: what waits deep in the model beats without being
handed anything. A beat is two assignments, cheap enough for every token and microbatch.
"""

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Beat:
    """The last sign of life."""

    phase: str
    """`start`, a phase of a step (trainer.step), `metrics` or `checkpoint`."""
    step: int | None
    """None before the first one."""
    at: float
    """By time.monotonic()."""

    def __str__(self) -> str:
        return f"step {'-' if self.step is None else self.step}, phase {self.phase}"


_last = Beat("start", None, time.monotonic())


def beat(phase: str | None = None, step: int | None = None) -> None:
    """Say that the work goes on: in the phase and step given, or else in those said before."""
    global _last
    last = _last
    _last = Beat(phase or last.phase, last.step if step is None else step, time.monotonic())


def last_beat() -> Beat:
    return _last
