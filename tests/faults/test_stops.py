"""Runs that are stopped, hang or fail: all ranks end together, and no step is lost."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aropd_mcore.convert.manifest import newest
from tests.conftest import REPO
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import write_run
from tests.support.training import read_checkpoints, read_lines, repeatable, train_on_ranks

pytestmark = pytest.mark.rest

NUM_STEPS = 6
NUM_RANKS = 4
PATIENCE = 150.0
"""Seconds until a job must have ended, also on a busy machine. A hang would exceed any limit."""


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return write_run(
        tmp_path_factory.mktemp("stops"),
        training={"num_steps": NUM_STEPS},
        checkpoint={"save_every_steps": 100},
        parallel={"tensor": 2},
        optimizer={"warmup_ratio": 0.25, "weight_decay": 0.1},
        guards={"window": 3, "loss_spike": "warn", "loss_spike_zscore": 0.1},
    )


@pytest.fixture(scope="module")
def uninterrupted(path) -> Path:
    out = path.parent / "uninterrupted"
    run_ranks(train_on_ranks, NUM_RANKS, path, [f"output_dir={out}"])
    return out


def assert_equal_runs(out: Path, uninterrupted: Path) -> None:
    """Compare the metrics of all steps, and the contents of the last checkpoints, bit for bit."""
    assert repeatable(read_lines(out)) == repeatable(read_lines(uninterrupted))
    assert read_lines(out)[-1]["num_loss_spikes"] > 0, "expected guards with a state"
    actual, expected = run_ranks(read_checkpoints, 1, [out, uninterrupted])[0]
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal(actual[name], value) if torch.is_tensor(value) else actual[name] == value
        assert same, name
    actual, expected = run_ranks(read_progress, 1, [out, uninterrupted])[0]
    assert actual == expected


def read_progress(outs: list[Path]) -> list[dict[str, Any]]:
    from aropd_mcore.mcore.checkpoint.state import read_common

    return [read_common(newest(out / "checkpoints") or out)["progress"] for out in outs]


# --- signals ---


def test_sigterm_to_one_rank_at_any_moment_loses_no_step(path, uninterrupted):
    """Rank and heartbeat are random: the signal arrives in a response, a microbatch, an update or a
    save."""
    seed = int(os.environ.get("AROPD_STOP_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
    draw = random.Random(seed)
    out = path.parent / "stopped"
    print(f"\nAROPD_STOP_SEED={seed}")
    for _ in range(4):
        rank, beat = draw.randrange(NUM_RANKS), draw.randrange(1, 90)
        ends = run_ranks(train_until_signal, NUM_RANKS, path, out, rank, beat)
        assert len(set(ends)) == 1, "expected the same end on all ranks"
        print(f"  SIGTERM to rank {rank} at its heartbeat {beat}: {ends[0]}")
    run_ranks(train_on_ranks, NUM_RANKS, path, [f"output_dir={out}"])
    assert_equal_runs(out, uninterrupted)


def train_until_signal(path: Path, out: Path, rank: int, at_beat: int) -> str:
    """Train, with a signal to `rank` at a heartbeat. Returns the reason of the end."""
    from aropd_mcore import heartbeat
    from aropd_mcore.config_file import load_config
    from aropd_mcore.trainer import loop
    from aropd_mcore.trainer.build import start_runtime
    from aropd_mcore.trainer.stop import StoppedEarly, Stops

    config = load_config(path, [f"output_dir={out}"])
    runtime = start_runtime(config)
    num_beats = 0

    def counting_clock() -> float:
        nonlocal num_beats
        num_beats += 1
        if num_beats == at_beat and runtime.rank == rank:
            signal.raise_signal(signal.SIGTERM)
        return time.monotonic()

    heartbeat.time = SimpleNamespace(monotonic=counting_clock)  # type: ignore[assignment]
    try:
        with Stops().listening(signal.SIGTERM) as stops:
            loop.train(config, runtime, stops)
    except StoppedEarly as stopped:
        return str(stopped)
    finally:
        heartbeat.time = time
    return "complete"


def test_sigusr1_to_the_launcher_saves_and_the_same_command_resumes(path, uninterrupted, capsys):
    """Only the launcher receives the signal, within a step. It forwards the signal to the ranks."""
    out = path.parent / "signalled"
    command = [sys.executable, "-m", "aropd_mcore.cli", "train", str(path), f"output_dir={out}"]
    command += ["--nproc-per-node", str(NUM_RANKS)]
    job = start(command, {})
    wait_until(lambda: len(read_lines(out)) >= 2, job)
    sent = time.monotonic()
    job.send_signal(signal.SIGUSR1)
    wait_until(lambda: newest(out / "checkpoints") is not None, job, may_end=True)
    saved = time.monotonic()
    printed, _ = job.communicate(timeout=PATIENCE)
    assert job.returncode == 75, printed
    with capsys.disabled():
        print(
            f"\n  from SIGUSR1 to a complete checkpoint: {saved - sent:.2f} s, to the job's end: "
            f"{time.monotonic() - sent:.2f} s; {NUM_RANKS} ranks, "
            f"steps of {mean_seconds(read_lines(out)):.2f} s"
        )
    assert "aropd: stopped: SIGUSR1 before step" in printed
    assert "rerun the command to resume" in printed and "Traceback" not in printed

    done = start(command, {})
    printed, _ = done.communicate(timeout=PATIENCE)
    assert done.returncode == 0, printed
    assert_equal_runs(out, uninterrupted)


def test_a_signal_prints_no_stack():
    """Megatron's inference engines register faulthandler for signals when they are imported
    (inference/data_parallel_inference_coordinator.py). It would print a stack before the run's own
    handler is called."""
    code = """
import signal
from aropd_mcore.trainer.stop import Stops
with Stops().listening(signal.SIGTERM, signal.SIGINT) as stops:
    import aropd_mcore.rollout.generate, aropd_mcore.trainer.loop
    for number in (signal.SIGTERM, signal.SIGINT):
        stops.signal = 0
        signal.raise_signal(number)
        assert stops.signal == number
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Stack (most recent call first)" not in done.stderr


def mean_seconds(lines: list[dict[str, Any]]) -> float:
    seconds = [v for line in lines for k, v in line.items() if k.startswith("seconds/")]
    return sum(seconds) / len(lines)


# --- time limit ---


def test_time_limit_saves_and_stops(path):
    out = path.parent / "timed"
    for reason in run_ranks(train_for_seconds, 2, path, out, 6.0):
        assert reason.startswith("StoppedEarly: the time limit before step"), reason
    last = newest(out / "checkpoints")
    assert last is not None and int(last.name[5:]) == len(read_lines(out)) > 0
    [reason, _] = run_ranks(train_for_seconds, 2, path, out, 0.0)
    assert reason.startswith("TrainingStopped: the time limit leaves no room for one step"), reason
    assert str(last) in reason


def train_for_seconds(path: Path, out: Path, seconds: float) -> str:
    from aropd_mcore.config_file import load_config
    from aropd_mcore.trainer.build import start_runtime
    from aropd_mcore.trainer.loop import TrainingStopped, train
    from aropd_mcore.trainer.stop import StoppedEarly, Stops

    config = load_config(path, [f"output_dir={out}", "training.num_steps=100000"])
    stops = Stops(started=time.time(), deadline=time.time() + seconds)
    try:
        train(config, start_runtime(config), stops)
    except (TrainingStopped, StoppedEarly) as stopped:
        return f"{type(stopped).__name__}: {stopped}"
    return "complete"


# --- a rank that raises, is slow or hangs ---


def test_torchrun_rank_that_raises_ends_all_ranks_with_its_traceback_first(path):
    faults = {"rank": 2, "raise": 1, "prompts_per_step": 8}
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={NUM_RANKS}", "-m"]
    command = [sys.executable, "-m", *torchrun, "tests.faults.faulty", json.dumps(faults)]
    job = start([*command, "train", str(path), f"output_dir={path.parent / 'raised'}"], {})
    printed, _ = job.communicate(timeout=PATIENCE)
    assert job.returncode == 1, printed
    first = printed.index("[rank ")
    assert printed[first:].startswith("[rank 2] step 1, phase rollout\nTraceback"), printed
    assert "RuntimeError: an injected error at row" in printed
    assert printed.count("in train_step") == 1, printed
    for rank in (0, 1, 3):
        [line] = [line for line in printed.splitlines() if line.startswith(f"[rank {rank}] ")]
        assert "ended because rank 2 failed: RuntimeError: an injected error" in line


def test_watchdog_slow_rank_continues_and_hung_rank_ends_the_job(path):
    """The ranks are separate processes without a launcher, as with srun."""
    out = path.parent / "hung"
    faults = {"rank": 1, "slow": 0.5, "hang": 2, "prompts_per_step": 8}
    overrides = [f"output_dir={out}", "limits.watchdog_minutes=0.15"]
    ranks = start_each(2, faults, path, overrides)
    printed = "\n".join(rank.communicate(timeout=PATIENCE)[0] for rank in ranks)
    assert [rank.returncode for rank in ranks] == [4, 4], printed
    assert [line["step"] for line in read_lines(out)] == [0, 1], "expected the slow steps to finish"
    stacks = [(out / "stacks" / f"rank-{rank}.txt").read_text() for rank in range(2)]
    assert "[rank 1] step 2, phase rollout: no progress for" in stacks[1]
    assert "faulty_row_at" in stacks[1] and "train_step" in stacks[1]
    assert "[rank 0] step 2, phase" in stacks[0] and "train_step" in stacks[0]
    for stack in stacks:
        assert stack in printed


def test_collective_that_times_out_prints_phase_and_step(path):
    faults = {"rank": 1, "hang": 1, "prompts_per_step": 8}
    limits = ["limits.collective_timeout_minutes=0.1", "limits.watchdog_minutes=null"]
    ranks = start_each(2, faults, path, [f"output_dir={path.parent / 'late'}", *limits])
    printed = [rank.communicate(timeout=PATIENCE)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1], printed
    assert "[rank 0] step 1, phase rollout\nTraceback" in printed[0]
    assert "[rank 1] step 1, phase rollout: ended because rank 0 failed" in printed[1]


def start(command: list[str], environment: dict[str, str]) -> subprocess.Popen:
    return subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), **environment},
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_each(
    world_size: int, faults: dict[str, Any], path: Path, overrides: list[str]
) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    job = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "tests.faults.faulty", json.dumps(faults), "train", str(path)]
    return [
        start([*command, *overrides], {"RANK": str(rank), "LOCAL_RANK": str(rank), **job})
        for rank in range(world_size)
    ]


def wait_until(condition, job: subprocess.Popen, *, may_end: bool = False) -> None:
    until = time.monotonic() + PATIENCE
    while not condition():
        if (job.poll() is not None and not may_end) or time.monotonic() > until:
            job.kill()
            pytest.fail(f"the job ended, or hung:\n{job.communicate()[0]}")
        time.sleep(0.005)
