"""A run that is killed and goes on equals the run that was never killed, bit by bit."""

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
    """Two data-parallel ranks, so that each holds half of the optimizer's state."""
    return write_run(
        tmp_path_factory.mktemp("resume"),
        # Not in the background: what is saved when a kill comes is to be known.
        checkpoint={"save_every_steps": 2, "asynchronous": False},
        optimizer={"warmup_ratio": 0.25, "weight_decay": 0.1},
    )


@pytest.fixture(scope="module")
def unbroken(path) -> Path:
    """The output of four steps in one go."""
    out = path.parent / "unbroken"
    run_ranks(train_on_ranks, 2, path, [f"output_dir={out}"])
    return out


@pytest.mark.rest
def test_killed_twice_and_resumed_is_bitwise_the_unbroken_run(path, unbroken):
    out = path.parent / "out"
    # While step 4 of 4 is under way: two steps are saved, in the background, the third is only
    # reported.
    kill_when(lambda: len(read_lines(out)) >= 3 and saved_steps(out) == [2], path)
    assert len(read_lines(out)) >= 3
    # A kill can also leave half a line.
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')

    # While the checkpoint of step 4 is being written.
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
    assert repeatable(read_lines(out)) == repeatable(read_lines(unbroken))

    found, expected = run_ranks(read_checkpoints, 1, [out, unbroken])[0]
    assert found.keys() == expected.keys()
    for what in (
        "decoder.",
        "teacher.decoder.",
        "optimizer.state.exp_avg.",
        "optimizer.state.param.",
    ):
        assert any(name.startswith(what) for name in found), what
    for name, value in expected.items():
        same = torch.equal(found[name], value) if torch.is_tensor(value) else found[name] == value
        assert same, name


def test_another_layout_goes_on_with_the_same_losses(path, unbroken):
    out = halfway(unbroken, path.parent / "other-layout")
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
    lines, expected = read_lines(out), read_lines(unbroken)
    assert repeatable(lines[:2]) == repeatable(expected[:2])
    assert_same_in_any_layout(lines, expected)
    assert saved_steps(out) == [3, 4], "keep_last 2 keeps the newest two"
    tracker = out / "checkpoints" / "latest_checkpointed_iteration.txt"
    assert tracker.read_text() == "4"


@pytest.mark.rest
def test_experts_move_between_layouts(tmp_path):
    """From tensor ranks, with one optimizer, to expert ranks, with two, which then cut each expert
    as well, and to a rank alone."""
    path = write_run(tmp_path, checkpoint={"save_every_steps": 1, "keep_last": 4})
    model = f"model.path={write_model(tmp_path / 'experts', 'qwen3_moe')}"
    run_ranks(train_on_ranks, 2, path, [model, "parallel.tensor=2", "parallel.sequence=true"])
    expected = read_lines(tmp_path / "out")
    assert len(expected) == 4

    shared_out = checkpoint_of(tmp_path / "out", 1, tmp_path / "shared-out")
    layout = ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.expert=2"]
    run_ranks(train_on_ranks, 4, path, [model, f"output_dir={shared_out}", *layout])
    cut = checkpoint_of(shared_out, 2, tmp_path / "cut")
    layout = ["parallel.tensor=2", "parallel.sequence=true", "parallel.expert_tensor=2"]
    run_ranks(train_on_ranks, 4, path, [model, f"output_dir={cut}", *layout, "parallel.expert=2"])
    alone = checkpoint_of(cut, 3, tmp_path / "alone")
    run_ranks(train_on_ranks, 1, path, [model, f"output_dir={alone}"])
    for out in (shared_out, cut, alone):
        assert_same_in_any_layout(read_lines(out), expected)


def test_new_settings_hold_from_the_resumed_step_on(path, unbroken):
    out = halfway(unbroken, path.parent / "other-schedule")
    changes = ["training.num_steps=5", "optimizer.lr=4e-4", "optimizer.min_lr=1e-4"]
    run_ranks(train_on_ranks, 2, path, [f"output_dir={out}", *changes])
    # One step of warm-up in five, and then a cosine over four, of which one is behind us.
    expected = [1e-4 + 3e-4 * (1 + math.cos(math.pi * n / 4)) / 2 for n in (1, 2, 3)]
    assert [line["lr"] for line in read_lines(out)[2:]] == pytest.approx(expected)


def halfway(unbroken: Path, out: Path) -> Path:
    """`out`, with the unbroken run's checkpoint of step 2 and all its metrics."""
    return checkpoint_of(unbroken, 2, out)


def checkpoint_of(run: Path, step: int, out: Path) -> Path:
    """`out`, with the run's checkpoint of a step and all its metrics."""
    checkpoint = f"checkpoints/iter_{step:07d}"
    shutil.copytree(run / checkpoint, out / checkpoint)
    shutil.copy(run / "metrics.jsonl", out)
    return out


@pytest.mark.rest
def test_saves_by_the_clock_and_what_is_kept_for_good(path, unbroken):
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


def test_a_finished_run_has_nothing_left_to_do(path, unbroken):
    before = (unbroken / "metrics.jsonl").read_bytes()
    run_ranks(train_on_ranks, 2, path, [f"output_dir={unbroken}"])
    assert (unbroken / "metrics.jsonl").read_bytes() == before
    assert saved_steps(unbroken) == [2, 4]


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
            os.killpg(rank.pid, signal.SIGKILL)  # and what dist_checkpointing has started
        for rank in ranks:
            rank.wait()
        log.close()


def partial_files(out: Path, step: int) -> list[Path]:
    """Of a checkpoint that is not whole yet."""
    return list(out.glob(f"checkpoints/.iter_{step:07d}.*.partial/*"))
