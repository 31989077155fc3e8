"""When a job has to save and leave: a signal, or the end of its time. Its ranks agree on it.

A signal reaches ranks at different moments, or one of them alone, and no two clocks are the same:
nobody leaves by its own. At the borders of a step's phases before the update the ranks ask each
other, and where one wants to stop all abandon the step, of which nothing has happened yet. Whoever
samples for minutes asks `is_wanted` in between, and may then return early what nobody will read.
"""

import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import time
from typing import Protocol

from aropd_mcore.config import LimitsConfig

_TIME = 1
"""In the place of a signal's number; no signal that stops a run has it."""
_SHARE_OF_TIME, _LONGEST_MARGIN = 0.05, 60.0
_MARGINS_OF_A_SAVE = 3
"""What a save is taken to last before one was measured."""


class StopWanted(Exception):
    """Raised on every rank alike, where the job has to stop; before anything of the step is done.

    Attributes:
        why: `SIGUSR1`, `SIGTERM` or `the time limit`.
    """

    def __init__(self, code: int):
        self.is_time_limit = code == _TIME
        self.why = "the time limit" if self.is_time_limit else signal.Signals(code).name
        super().__init__(self.why)


class StoppedEarly(RuntimeError):
    """Everything is saved, and the same command goes on; the message says why and where."""


class Ranks(Protocol):
    """What of mcore.runtime.Runtime an agreement takes."""

    def max_over_job(self, value: int) -> int: ...


class Stops:
    """What this rank knows of reasons to stop, and what the ranks know together."""

    def __init__(self, *, started: float = 0.0, deadline: float | None = None):
        """
        Args:
            started, deadline: of the job, by time.time(); None: it may run for ever.
        """
        self.signal = 0
        """The number of the one that came; 0 is none."""
        self._longest_step = 0.0
        self.longest_save: float | None = None
        """Seconds, once it is known."""
        self._deadline = deadline
        if deadline is not None:
            self._margin = min(_SHARE_OF_TIME * (deadline - started), _LONGEST_MARGIN)

    def is_wanted(self) -> bool:
        """Whether this rank wants to stop; costs nothing, decides nothing."""
        return self._code(step=0.0) != 0

    def check(self, ranks: Ranks, *, before_step: bool = False) -> None:
        """Stop if any rank wants to.

        Args:
            before_step: also if another step, as long as the longest one, would not fit.
        Raises:
            StopWanted: on every rank alike.
        Collectives: one all-reduce over the job; every rank must call it.
        """
        code = ranks.max_over_job(self._code(step=self._longest_step if before_step else 0.0))
        if code:
            raise StopWanted(code)

    def _code(self, *, step: float) -> int:
        if self.signal or self._deadline is None:
            return self.signal
        save = self.longest_save
        needed = step + self._margin
        needed += _MARGINS_OF_A_SAVE * self._margin if save is None else save
        return _TIME if time() + needed > self._deadline else 0

    @contextmanager
    def timing_step(self) -> Iterator[None]:
        """Learn from the block how long a step takes."""
        started = time()
        yield
        self._longest_step = max(self._longest_step, time() - started)

    @contextmanager
    def listening(self, *signals: signal.Signals) -> Iterator["Stops"]:
        """While the block runs, `signals` mean that the run shall stop.

        Processes that were forked from this one, such as those that write checkpoints, ignore them:
        Slurm signals every process of a task.
        """
        here = os.getpid()

        def note(number: int, _frame: object) -> None:
            if os.getpid() == here:
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
    """When the job has to be gone, by time.time(): as the settings say, or Slurm if that is sooner.

    Args:
        started: of this process. Under Slurm a job's time begins with the job.
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
