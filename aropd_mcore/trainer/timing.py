"""Phases of a step: their times, and the points at which a step may be abandoned."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from aropd_mcore.heartbeat import beat
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.trainer.stop import Stops

_BEFORE_UPDATE = ("teacher", "student")
"""Phases that change no state of the run. The step may be abandoned at their end."""


class Phases:
    """Timer of a step's phases, in wall-clock seconds. A phase's end waits for the GPU."""

    def __init__(self, step: int, runtime: Runtime, stops: Stops):
        self.seconds: dict[str, float] = {}
        self._step = step
        self._runtime = runtime
        self._stops = stops

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """
        Raises:
            StopWanted: a rank wants to stop. Raised on every rank, at the end of the teacher or
                student phase.
        Collectives: one all-reduce over the job, at the end of these two phases.
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
    """Compute `seconds/*`, whose sum is the whole time of the step, and `tokens_per_second`.

    Args:
        phases: seconds by phase.
        elapsed: seconds from the start of the step until its metrics are known. The part outside of
            the phases is `seconds/other`.
        saving: seconds that saves have blocked training since the previous step. They are not part
            of `elapsed`.
    """
    return {
        **{f"seconds/{phase}": seconds for phase, seconds in phases.items()},
        "seconds/other": elapsed - sum(phases.values()),
        "seconds/checkpoint": saving,
        "tokens_per_second": num_response_tokens / (elapsed + saving),
    }
