"""Decision to stop by time limit or signal. tests/faults tests it on several ranks."""

import os
import signal

import pytest

from aropd_mcore.config import LimitsConfig
from aropd_mcore.trainer import stop
from aropd_mcore.trainer.stop import Stops, StopWanted, job_deadline

HOUR = 3600.0


class OneRank:
    """A job of one rank."""

    def max_over_job(self, value: int) -> int:
        return value


@pytest.fixture
def clock(monkeypatch):
    """A fake clock: set clock[0] to the time in seconds."""
    clock = [0.0]
    monkeypatch.setattr(stop, "time", lambda: clock[0])
    return clock


def stops_at(clock: list[float], stops: Stops, now: float, *, before_step: bool = False) -> bool:
    clock[0] = now
    try:
        stops.check(OneRank(), before_step=before_step)
    except StopWanted as error:
        assert error.reason == "the time limit" and error.is_time_limit
        return True
    return False


def test_time_limit_leaves_room_for_the_longest_save_and_step(clock):
    stops = Stops(started=0.0, deadline=4 * HOUR)
    margin = 60.0
    assert not stops_at(clock, stops, 4 * HOUR - 4 * margin - 1)
    assert stops_at(clock, stops, 4 * HOUR - 4 * margin + 1), (
        "before the first save, three margins are reserved"
    )
    stops.longest_save = 300.0
    clock[0] = 0.0
    with stops.timing_step():
        clock[0] = 900.0
    with stops.timing_step():
        clock[0] = 1000.0
    reserve = margin + 300.0
    assert not stops_at(clock, stops, 4 * HOUR - reserve - 1)
    assert stops_at(clock, stops, 4 * HOUR - reserve + 1), "in the middle of a step"
    assert not stops_at(clock, stops, 4 * HOUR - reserve - 901, before_step=True)
    assert stops_at(clock, stops, 4 * HOUR - reserve - 899, before_step=True)


def test_time_limit_of_a_short_job_leaves_time_for_a_step(clock):
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
def test_job_deadline_is_the_earlier_of_setting_and_slurm(stop_before, environ, deadline):
    limits = LimitsConfig(stop_before=stop_before)
    assert job_deadline(limits, started=1000.0, environ=environ) == deadline


def test_signal_blocked_by_the_launcher_is_received():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        with Stops().listening(signal.SIGUSR1) as stops:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert stops.is_wanted()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_signal_is_received_and_forks_ignore_it():
    with Stops().listening(signal.SIGTERM) as stops:
        child = os.fork()
        if child == 0:
            signal.raise_signal(signal.SIGTERM)
            os._exit(stops.signal)
        assert os.waitpid(child, 0)[1] == 0, (
            "the signal neither ends the fork nor sets its stops.signal"
        )
        assert not stops.is_wanted()
        signal.raise_signal(signal.SIGTERM)
        assert stops.is_wanted()
        with pytest.raises(StopWanted, match="SIGTERM"):
            stops.check(OneRank())
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
