"""The phases of a step: their time, and where the step may be abandoned."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from aropd_mcore.heartbeat import beat
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.trainer.stop import Stops

_BEFORE_UPDATE = ("teacher", "student")
"""Phases after which nothing of the run has changed."""


class Phases:
    """Wall-clock seconds by phase; waits for the GPU at a phase's end."""

    def __init__(self, step: int, runtime: Runtime, stops: Stops):
        self.seconds: dict[str, float] = {}
        self._step = step
        self._runtime = runtime
        self._stops = stops

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """
        Raises:
            StopWanted: at the end of a phase before the update, on every rank alike.
        Collectives: where it may raise, one all-reduce over the job.
        """
        beat(phase, self._step)
        start = time.perf_counter()
        yield
        if self._runtime.device.type == "cuda":
            torch.cuda.synchronize(self._runtime.device)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
        if phase in _BEFORE_UPDATE:
            self._stops.check(self._runtime)


def time_metrics(
    phases: Mapping[str, float], *, elapsed: float, saving: float, num_response_tokens: int
) -> dict[str, float]:
    """Compute `seconds/*`, whose sum is the step's whole time, and `tokens_per_second` over it.

    Args:
        phases: seconds by phase.
        elapsed: seconds from the step's beginning until its metrics are known. What the phases do
            not cover is `seconds/other`.
        saving: seconds that checkpoints have taken since the step before, beside `elapsed`.
    """
    return {
        **{f"seconds/{phase}": seconds for phase, seconds in phases.items()},
        "seconds/other": elapsed - sum(phases.values()),
        "seconds/checkpoint": saving,
        "tokens_per_second": num_response_tokens / (elapsed + saving),
    }
