"""Runs that are stopped, hang or fail: all ranks end together, and nothing is lost."""

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
"""Seconds for a job to end, on a machine that does other things too; a hang would take for ever."""


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
def unbroken(path) -> Path:
    out = path.parent / "unbroken"
    run_ranks(train_on_ranks, NUM_RANKS, path, [f"output_dir={out}"])
    return out


def assert_as_unbroken(out: Path, unbroken: Path) -> None:
    """Bit by bit: every step's metrics, and all that the last checkpoint holds."""
    assert repeatable(read_lines(out)) == repeatable(read_lines(unbroken))
    assert read_lines(out)[-1]["num_loss_spikes"] > 0, "the guards remember something"
    found, expected = run_ranks(read_checkpoints, 1, [out, unbroken])[0]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal(found[name], value) if torch.is_tensor(value) else found[name] == value
        assert same, name
    of_runs = run_ranks(progress_of, 1, [out, unbroken])[0]
    assert of_runs[0] == of_runs[1]


def progress_of(outs: list[Path]) -> list[dict[str, Any]]:
    from aropd_mcore.mcore.checkpoint.state import read_common

    return [read_common(newest(out / "checkpoints") or out)["progress"] for out in outs]


# --- signals ---


def test_a_signal_to_one_rank_at_any_moment_loses_nothing(path, unbroken):
    """Again and again, by a rank and a heartbeat that are drawn: in the middle of a response, of a
    microbatch, of an update, of a save."""
    seed = int(os.environ.get("AROPD_STOP_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
    draw = random.Random(seed)
    out = path.parent / "stopped"
    print(f"\nAROPD_STOP_SEED={seed}")
    for _ in range(4):
        rank, beat = draw.randrange(NUM_RANKS), draw.randrange(1, 90)
        ends = run_ranks(train_until_signal, NUM_RANKS, path, out, rank, beat)
        assert len(set(ends)) == 1, "every rank ends alike"
        print(f"  SIGTERM to rank {rank} at its heartbeat {beat}: {ends[0]}")
    run_ranks(train_on_ranks, NUM_RANKS, path, [f"output_dir={out}"])
    assert_as_unbroken(out, unbroken)


def train_until_signal(path: Path, out: Path, rank: int, at_beat: int) -> str:
    """What stopped the run, if it did not reach its end."""
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
    return "it came to its end"


def test_sigusr1_to_the_command_saves_and_the_command_goes_on(path, unbroken, capsys):
    """The launching process alone gets it, in the middle of a step, and passes it on."""
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
            f"\n  SIGUSR1 to a whole checkpoint: {saved - sent:.2f} s, to the job's end: "
            f"{time.monotonic() - sent:.2f} s; {NUM_RANKS} ranks, "
            f"steps of {mean_seconds(read_lines(out)):.2f} s"
        )
    assert "aropd: stopped: SIGUSR1 before step" in printed
    assert "rerun the command to resume" in printed and "Traceback" not in printed

    done = start(command, {})
    printed, _ = done.communicate(timeout=PATIENCE)
    assert done.returncode == 0, printed
    assert_as_unbroken(out, unbroken)


def test_a_signal_prints_no_stack():
    """As Megatron's inference engines have it do once they are imported, by faulthandler and before
    the run's own handler is asked (inference/data_parallel_inference_coordinator.py)."""
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


# --- time ---


def test_the_end_of_the_time_saves_as_well(path):
    out = path.parent / "timed"
    for said in run_ranks(train_for_seconds, 2, path, out, 6.0):
        assert said.startswith("StoppedEarly: the time limit before step"), said
    last = newest(out / "checkpoints")
    assert last is not None and int(last.name[5:]) == len(read_lines(out)) > 0
    [said, _] = run_ranks(train_for_seconds, 2, path, out, 0.0)
    assert said.startswith("TrainingStopped: the time limit leaves no room for one step"), said
    assert str(last) in said


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
    return "it came to its end"


# --- a rank that raises, is slow, hangs ---


def test_a_rank_that_raises_in_the_data_loader_ends_all_with_its_traceback_first(path):
    """Under torchrun."""
    faults = {"rank": 2, "raise": 1, "prompts_per_step": 8}
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={NUM_RANKS}", "-m"]
    command = [sys.executable, "-m", *torchrun, "tests.faults.faulty", json.dumps(faults)]
    job = start([*command, "train", str(path), f"output_dir={path.parent / 'raised'}"], {})
    printed, _ = job.communicate(timeout=PATIENCE)
    assert job.returncode == 1, printed
    first = printed.index("[rank ")
    assert printed[first:].startswith("[rank 2] step 1, phase rollout\nTraceback"), printed
    assert "RuntimeError: a planted error at row" in printed
    assert printed.count("in train_step") == 1, printed
    for rank in (0, 1, 3):
        [line] = [line for line in printed.splitlines() if line.startswith(f"[rank {rank}] ")]
        assert "ended because rank 2 failed: RuntimeError: a planted error" in line


def test_a_slow_rank_is_waited_for_and_a_hung_one_is_not(path):
    """Ranks by themselves, as srun starts them."""
    out = path.parent / "hung"
    faults = {"rank": 1, "slow": 0.5, "hang": 2, "prompts_per_step": 8}
    overrides = [f"output_dir={out}", "limits.watchdog_minutes=0.15"]
    ranks = start_each(2, faults, path, overrides)
    printed = "\n".join(rank.communicate(timeout=PATIENCE)[0] for rank in ranks)
    assert [rank.returncode for rank in ranks] == [4, 4], printed
    assert [line["step"] for line in read_lines(out)] == [0, 1], "slow, but no reason to end"
    stacks = [(out / "stacks" / f"rank-{rank}.txt").read_text() for rank in range(2)]
    assert "[rank 1] step 2, phase rollout: no progress for" in stacks[1]
    assert "faulty_row_at" in stacks[1] and "train_step" in stacks[1]
    assert "[rank 0] step 2, phase" in stacks[0] and "train_step" in stacks[0]
    for stack in stacks:
        assert stack in printed


def test_a_collective_that_times_out_names_phase_and_step(path):
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


def wait_until(is_time, job: subprocess.Popen, *, may_end: bool = False) -> None:
    until = time.monotonic() + PATIENCE
    while not is_time():
        if (job.poll() is not None and not may_end) or time.monotonic() > until:
            job.kill()
            pytest.fail(f"the job ended, or hung:\n{job.communicate()[0]}")
        time.sleep(0.005)
