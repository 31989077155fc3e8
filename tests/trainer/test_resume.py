"""A run that is killed and resumed equals an uninterrupted run, bit for bit in the same layout."""

import math
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import REPO
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import write_model, write_run
from tests.support.training import (
    assert_same_in_any_layout,
    command,
    environment,
    read_checkpoints,
    read_lines,
    repeatable,
    saved_steps,
    train_on_ranks,
)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """A run for two data-parallel ranks, each with half of the optimizer's state."""
    return write_run(
        tmp_path_factory.mktemp("resume"),
        # Saves are synchronous, so it is known what is saved when a kill comes.
        checkpoint={"save_every_steps": 2, "asynchronous": False},
        optimizer={"warmup_ratio": 0.25, "weight_decay": 0.1},
    )


@pytest.fixture(scope="module")
def uninterrupted(path) -> Path:
    """Output folder of four uninterrupted steps."""
    out = path.parent / "uninterrupted"
    run_ranks(train_on_ranks, 2, path, [f"output_dir={out}"])
    return out


@pytest.mark.rest
def test_run_killed_twice_and_resumed_equals_the_uninterrupted_run_bitwise(path, uninterrupted):
    out = path.parent / "out"
    # The first kill comes during step 4 of 4: two steps are saved, the third is only reported.
    kill_when(lambda: len(read_lines(out)) >= 3 and saved_steps(out) == [2], path)
    assert len(read_lines(out)) >= 3
    # A kill can also leave half a line.
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')

    # The second kill comes while the checkpoint of step 4 is written.
    kill_when(lambda: any(partial_files(out, 4)), path)
    assert saved_steps(out) == [2]
    assert any(partial_files(out, 4))

    printed = subprocess.run(
        command(path, "--nproc-per-node", "2"),
        env=environment(),
        cwd=REPO,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert "resuming at step 2" in printed
    assert saved_steps(out) == [2, 4]
    assert repeatable(read_lines(out)) == repeatable(read_lines(uninterrupted))

    state, expected = run_ranks(read_checkpoints, 1, [out, uninterrupted])[0]
    assert state.keys() == expected.keys()
    for prefix in (
        "decoder.",
        "teacher.decoder.",
        "optimizer.state.exp_avg.",
        "optimizer.state.param.",
    ):
        assert any(name.startswith(prefix) for name in state), prefix
    for name, value in expected.items():
        same = torch.equal(state[name], value) if torch.is_tensor(value) else state[name] == value
        assert same, name


@pytest.mark.rest
def test_run_resumed_in_another_layout_has_the_same_losses(path, uninterrupted):
    out = copy_step_2(uninterrupted, path.parent / "other-layout")
    run_ranks(
        train_on_ranks,
        4,
        path,
        [
            f"output_dir={out}",
            "parallel.tensor=2",
            "parallel.sequence=true",
            "parallel.context=2",
            "checkpoint.save_every_steps=1",
            "checkpoint.keep_last=2",
        ],
    )
    lines, expected = read_lines(out), read_lines(uninterrupted)
    assert repeatable(lines[:2]) == repeatable(expected[:2])
    assert_same_in_any_layout(lines, expected)
    assert saved_steps(out) == [3, 4], "keep_last 2 keeps the newest two"
    tracker = out / "checkpoints" / "latest_checkpointed_iteration.txt"
    assert tracker.read_text() == "4"


@pytest.mark.rest
def test_run_with_experts_resumed_in_other_layouts_has_the_same_losses(tmp_path):
    """From tensor ranks, with one optimizer, to expert ranks, with two optimizers, then to expert
    tensor ranks, and to a single rank."""
    path = write_run(tmp_path, checkpoint={"save_every_steps": 1, "keep_last": 4})
    model = f"model.path={write_model(tmp_path / 'experts', 'qwen3_moe')}"
    run_ranks(train_on_ranks, 2, path, [model, "parallel.tensor=2", "parallel.sequence=true"])
    expected = read_lines(tmp_path / "out")
    assert len(expected) == 4

    expert_parallel = copy_checkpoint(tmp_path / "out", 1, tmp_path / "expert-parallel")
    layout = ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.expert=2"]
    run_ranks(train_on_ranks, 4, path, [model, f"output_dir={expert_parallel}", *layout])
    expert_tensor = copy_checkpoint(expert_parallel, 2, tmp_path / "expert-tensor")
    layout = ["parallel.tensor=2", "parallel.sequence=true", "parallel.expert_tensor=2"]
    layout += ["parallel.expert=2"]
    run_ranks(train_on_ranks, 4, path, [model, f"output_dir={expert_tensor}", *layout])
    single = copy_checkpoint(expert_tensor, 3, tmp_path / "single")
    run_ranks(train_on_ranks, 1, path, [model, f"output_dir={single}"])
    for out in (expert_parallel, expert_tensor, single):
        assert_same_in_any_layout(read_lines(out), expected)


def test_changed_schedule_takes_effect_from_the_resumed_step(path, uninterrupted):
    out = copy_step_2(uninterrupted, path.parent / "other-schedule")
    changes = ["training.num_steps=5", "optimizer.lr=4e-4", "optimizer.min_lr=1e-4"]
    run_ranks(train_on_ranks, 2, path, [f"output_dir={out}", *changes])
    # One of five steps is warm-up. The cosine covers the other four, the first of which is done.
    expected = [1e-4 + 3e-4 * (1 + math.cos(math.pi * n / 4)) / 2 for n in (1, 2, 3)]
    assert [line["lr"] for line in read_lines(out)[2:]] == pytest.approx(expected)


def copy_step_2(uninterrupted: Path, out: Path) -> Path:
    """Copy the uninterrupted run's checkpoint of step 2 and all its metrics into `out`."""
    return copy_checkpoint(uninterrupted, 2, out)


def copy_checkpoint(run: Path, step: int, out: Path) -> Path:
    """Copy the run's checkpoint of a step and all its metrics into `out`."""
    checkpoint = f"checkpoints/iter_{step:07d}"
    shutil.copytree(run / checkpoint, out / checkpoint)
    shutil.copy(run / "metrics.jsonl", out)
    return out


@pytest.mark.rest
def test_save_every_minutes_saves_and_keep_every_keeps(path, uninterrupted):
    out = path.parent / "by-the-clock"
    settings = {
        "asynchronous": "true",
        "save_every_steps": "null",
        "save_every_minutes": 1e-4,
        "keep_last": 1,
        "keep_every": 2,
    }
    overrides = [f"checkpoint.{name}={value}" for name, value in settings.items()]
    run_ranks(train_on_ranks, 2, path, [f"output_dir={out}", "training.num_steps=3", *overrides])
    assert saved_steps(out) == [2, 3]
    lines = read_lines(out)
    assert all(line["seconds/checkpoint"] > 0 for line in lines[1:])


def test_complete_run_started_again_changes_nothing(path, uninterrupted):
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    run_ranks(train_on_ranks, 2, path, [f"output_dir={uninterrupted}"])
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before
    assert saved_steps(uninterrupted) == [2, 4]


def kill_when(is_time: Callable[[], bool], path: Path) -> None:
    """Start the job's two ranks and kill both with SIGKILL as soon as `is_time()`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    log = (path.parent / "killed.log").open("w+")
    ranks = [
        subprocess.Popen(
            command(path),
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **job),
            cwd=REPO,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        for rank in range(2)
    ]
    try:
        while not is_time():
            if any(rank.poll() is not None for rank in ranks):
                log.seek(0)
                pytest.fail(f"a rank ended before it could be killed:\n{log.read()}")
            time.sleep(0.002)
    finally:
        for rank in ranks:
            os.killpg(
                rank.pid, signal.SIGKILL
            )  # also the processes that dist_checkpointing started
        for rank in ranks:
            rank.wait()
        log.close()


def partial_files(out: Path, step: int) -> list[Path]:
    """Return the files of a checkpoint that is not complete yet."""
    return list(out.glob(f"checkpoints/.iter_{step:07d}.*.partial/*"))
