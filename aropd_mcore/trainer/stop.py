"""Early stop of a job on a signal or near its time limit, agreed on by all ranks.

A signal may reach ranks at different moments, or one rank only, and clocks differ. So no rank stops
by itself. After each phase before the update, the ranks exchange their wishes. If one rank wants to
stop, all ranks abandon the step, which has changed nothing yet. A long rollout phase polls
`is_wanted` and may return early, since its result will be discarded.
"""

import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import time
from typing import Protocol

from aropd_mcore.config import LimitsConfig

_TIME = 1
"""Code of the time limit. All other codes are signal numbers, none of which is 1."""
_MARGIN_SHARE, _LONGEST_MARGIN = 0.05, 60.0
"""The margin is a share of the job's time, up to a number of seconds."""
_SAVE_MARGINS = 3
"""Assumed duration of a save before the first measurement, in margins."""


class StopWanted(Exception):
    """The job has to stop. Raised on every rank, before the step changes the run's state.

    Attributes:
        reason: `SIGUSR1`, `SIGTERM` or `the time limit`.
    """

    def __init__(self, code: int):
        self.is_time_limit = code == _TIME
        self.reason = "the time limit" if self.is_time_limit else signal.Signals(code).name
        super().__init__(self.reason)


class StoppedEarly(RuntimeError):
    """The run is saved and can resume. The message states the reason and the checkpoint."""


class Ranks(Protocol):
    """Protocol of the part of mcore.runtime.Runtime that the agreement uses."""

    def max_over_job(self, value: int) -> int: ...


class Stops:
    """Reasons of this rank to stop, and the agreement of all ranks on them."""

    def __init__(self, *, started: float = 0.0, deadline: float | None = None):
        """
        Args:
            started: start of the job, by time.time().
            deadline: end of the job, by time.time(). None: no time limit.
        """
        self.signal = 0
        """Number of the received signal. 0: none."""
        self._longest_step = 0.0
        self.longest_save: float | None = None
        """Duration of the longest save so far, in seconds. None: unknown."""
        self._deadline = deadline
        if deadline is not None:
            self._margin = min(_MARGIN_SHARE * (deadline - started), _LONGEST_MARGIN)

    def is_wanted(self) -> bool:
        """Return whether this rank wants to stop. Cheap, without collectives and without effect."""
        return self._code(step=0.0) != 0

    def check(self, ranks: Ranks, *, before_step: bool = False) -> None:
        """Raise StopWanted if any rank wants to stop.

        Args:
            before_step: also stop if the time left is too short for a step like the longest so far.
        Raises:
            StopWanted: a rank wants to stop. Raised on every rank.
        Collectives: one all-reduce over the job. Every rank must call it.
        """
        code = ranks.max_over_job(self._code(step=self._longest_step if before_step else 0.0))
        if code:
            raise StopWanted(code)

    def _code(self, *, step: float) -> int:
        if self.signal or self._deadline is None:
            return self.signal
        save = self.longest_save
        needed = step + self._margin
        needed += _SAVE_MARGINS * self._margin if save is None else save
        return _TIME if time() + needed > self._deadline else 0

    @contextmanager
    def timing_step(self) -> Iterator[None]:
        """Measure the duration of a step, which is the body of the `with` block."""
        started = time()
        yield
        self._longest_step = max(self._longest_step, time() - started)

    @contextmanager
    def listening(self, *signals: signal.Signals) -> Iterator["Stops"]:
        """Treat `signals` as requests to stop, in the body of the `with` block.

        Processes forked from this one, such as checkpoint writers, ignore them. They receive them
        because Slurm signals every process of a task.
        """
        own_pid = os.getpid()

        def note(number: int, _frame: object) -> None:
            if os.getpid() == own_pid:
                self.signal = number

        before = {number: signal.signal(number, note) for number in signals}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)  # a launcher's mask is inherited
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def job_deadline(
    limits: LimitsConfig, *, started: float, environ: Mapping[str, str] = os.environ
) -> float | None:
    """Return the end of the job by time.time(): limits.stop_before or Slurm's end, if earlier.

    Args:
        started: start of this process. Under Slurm, limits.stop_before counts from the job's start.
    Returns:
        None if there is no time limit.
    """
    ends = []
    if limits.stop_before_seconds is not None:
        ends.append(_time_in(environ, "SLURM_JOB_START_TIME", started) + limits.stop_before_seconds)
    if (slurm := _time_in(environ, "SLURM_JOB_END_TIME", 0.0)) > started:  # 0: unlimited
        ends.append(slurm)
    return min(ends, default=None)


def _time_in(environ: Mapping[str, str], name: str, default: float) -> float:
    text = environ.get(name, "")
    return float(text) if text.isdigit() else default
