"""When a job's time is up; what ranks do about it is in tests/faults."""

import os
import signal

import pytest

from aropd_mcore.config import LimitsConfig
from aropd_mcore.trainer import stop
from aropd_mcore.trainer.stop import Stops, StopWanted, job_deadline

HOUR = 3600.0


class Alone:
    """A job of one rank."""

    def max_over_job(self, value: int) -> int:
        return value


@pytest.fixture
def clock(monkeypatch):
    """Set it: clock[0] = seconds."""
    now = [0.0]
    monkeypatch.setattr(stop, "time", lambda: now[0])
    return now


def stops_at(clock: list[float], stops: Stops, now: float, *, before_step: bool = False) -> bool:
    clock[0] = now
    try:
        stops.check(Alone(), before_step=before_step)
    except StopWanted as wanted:
        assert wanted.why == "the time limit" and wanted.is_time_limit
        return True
    return False


def test_a_save_and_a_step_as_long_as_the_longest_must_fit(clock):
    stops = Stops(started=0.0, deadline=4 * HOUR)
    margin = 60.0
    assert not stops_at(clock, stops, 4 * HOUR - 4 * margin - 1)
    assert stops_at(clock, stops, 4 * HOUR - 4 * margin + 1), "what a save takes is not known"
    stops.longest_save = 300.0
    clock[0] = 0.0
    with stops.timing_step():
        clock[0] = 900.0
    with stops.timing_step():
        clock[0] = 1000.0
    left = margin + 300.0
    assert not stops_at(clock, stops, 4 * HOUR - left - 1)
    assert stops_at(clock, stops, 4 * HOUR - left + 1), "in the middle of a step"
    assert not stops_at(clock, stops, 4 * HOUR - left - 901, before_step=True)
    assert stops_at(clock, stops, 4 * HOUR - left - 899, before_step=True)


def test_a_short_job_is_not_all_margin(clock):
    stops = Stops(started=100.0, deadline=160.0)
    assert not stops_at(clock, stops, 100.0, before_step=True)
    assert not stops_at(clock, Stops(), 1e12)


@pytest.mark.parametrize(
    ("stop_before", "environ", "deadline"),
    [
        (None, {}, None),
        ("1h", {}, 1000 + HOUR),
        ("1h", {"SLURM_JOB_START_TIME": "900"}, 900 + HOUR),
        ("1h", {"SLURM_JOB_END_TIME": "2000"}, 2000),
        ("1h", {"SLURM_JOB_END_TIME": "999999"}, 1000 + HOUR),
        (None, {"SLURM_JOB_END_TIME": "2000"}, 2000),
        (None, {"SLURM_JOB_END_TIME": "0"}, None),
        (None, {"SLURM_JOB_END_TIME": "Unknown"}, None),
    ],
)
def test_the_sooner_of_the_settings_and_slurm(stop_before, environ, deadline):
    limits = LimitsConfig(stop_before=stop_before)
    assert job_deadline(limits, started=1000.0, environ=environ) == deadline


def test_a_signal_that_the_launcher_has_blocked_is_noted():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        with Stops().listening(signal.SIGUSR1) as stops:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert stops.is_wanted()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_a_signal_is_noted_and_forks_ignore_it():
    with Stops().listening(signal.SIGTERM) as stops:
        child = os.fork()
        if child == 0:
            signal.raise_signal(signal.SIGTERM)
            os._exit(stops.signal)
        assert os.waitpid(child, 0)[1] == 0, "neither ended by it, nor taking it for its own"
        assert not stops.is_wanted()
        signal.raise_signal(signal.SIGTERM)
        assert stops.is_wanted()
        with pytest.raises(StopWanted, match="SIGTERM"):
            stops.check(Alone())
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
