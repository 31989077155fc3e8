"""A run that is killed at any moment, again and again, ends as the run that was never killed.

`make test-faults` kills 20 times; AROPD_KILLS and AROPD_KILL_SEED choose otherwise.
"""

import os
import random
import time
from pathlib import Path

import pytest
import torch

from tests.support.jobs import Job
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import write_run
from tests.support.training import (
    read_checkpoints,
    read_lines,
    repeatable,
    train_on_ranks,
)

pytestmark = pytest.mark.rest

NUM_STEPS, SAVE_EVERY = 30, 2
NUM_RANKS = 4


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return write_run(
        tmp_path_factory.mktemp("kill"),
        training={"num_steps": NUM_STEPS},
        checkpoint={"save_every_steps": SAVE_EVERY},
        parallel={"tensor": 2},
        optimizer={"warmup_ratio": 0.25, "weight_decay": 0.1},
    )


@pytest.mark.timeout(3600)
def test_killed_anywhere_ends_as_if_never_killed(path):
    num_kills = int(os.environ.get("AROPD_KILLS", "3"))
    seed = int(os.environ.get("AROPD_KILL_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
    draw = random.Random(seed)
    print(f"\nAROPD_KILL_SEED={seed}: {num_kills} kills")
    out = path.parent / "out"

    for number in range(num_kills):
        job = Job(path, NUM_RANKS)
        try:
            said = kill_somewhere(job, out, draw)
        finally:
            job.end()
        print(f"  {number + 1}: {said}; {len(read_lines(out))} steps reported, saved {saved(out)}")
    finished = Job(path, NUM_RANKS)
    assert finished.process.wait(300) == 0, finished.log.read_text()

    unbroken = path.parent / "unbroken"
    run_ranks(train_on_ranks, NUM_RANKS, path, [f"output_dir={unbroken}"])
    lines = read_lines(out)
    assert [line["step"] for line in lines] == list(range(NUM_STEPS))
    assert repeatable(lines) == repeatable(read_lines(unbroken))
    found, expected = run_ranks(read_checkpoints, 1, [out, unbroken])[0]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal(found[name], value) if torch.is_tensor(value) else found[name] == value
        assert same, name


def kill_somewhere(job: Job, out: Path, draw: random.Random) -> str:
    """Wait for a moment in a start, a step or (half of the times) a save, and kill one rank or
    all; what was done, in words."""
    num_lines = len(read_lines(out))
    # Near its end the run must not get away.
    is_late = num_lines > NUM_STEPS - 4 * SAVE_EVERY
    where = "start" if is_late else draw.choices(["save", "step", "start"], [5, 4, 1])[0]
    if where == "save":
        # Before the second begins the first is whole: half of these lives leave a checkpoint.
        seen = being_written(out)
        enough = len(seen) + draw.randint(1, 2)

        def has_begun() -> bool:
            seen.update(being_written(out))
            return len(seen) >= enough

        job.wait_until(has_begun)
        delay = draw.uniform(0, 0.4)
    elif where == "step":
        num_more = draw.randint(1, 3 * SAVE_EVERY)
        job.wait_until(lambda: len(read_lines(out)) >= num_lines + num_more)
        delay = draw.uniform(0, 1.0)
    else:
        delay = draw.uniform(1.0, 10.0)
    time.sleep(delay)
    victim = draw.choice([None, *range(NUM_RANKS)])
    job.kill(victim)
    return f"{where} + {delay:.3f} s, {'all' if victim is None else f'rank {victim}'}"


def being_written(out: Path) -> set[str]:
    return {p.name for p in out.glob("checkpoints/.iter_*.partial") if any(p.iterdir())}


def saved(out: Path) -> list[str]:
    return sorted(p.name for p in out.glob("checkpoints/iter_*"))
