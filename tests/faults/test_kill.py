"""A run that is killed repeatedly at random moments ends with the results of an uninterrupted run.

`make test-faults` kills it 20 times. AROPD_KILLS and AROPD_KILL_SEED set other values.
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
def test_killed_run_equals_the_uninterrupted_run(path):
    num_kills = int(os.environ.get("AROPD_KILLS", "1"))
    seed = int(os.environ.get("AROPD_KILL_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
    draw = random.Random(seed)
    print(f"\nAROPD_KILL_SEED={seed}: {num_kills} kills")
    out = path.parent / "out"

    for number in range(num_kills):
        job = Job(path, NUM_RANKS)
        try:
            moment = kill_at_random_moment(job, out, draw)
        finally:
            job.end()
        print(f"  {number + 1}: {moment}; {len(read_lines(out))} steps logged, saved {saved(out)}")
    finished = Job(path, NUM_RANKS)
    assert finished.process.wait(300) == 0, finished.log.read_text()

    reference = path.parent / "reference"
    run_ranks(train_on_ranks, NUM_RANKS, path, [f"output_dir={reference}"])
    lines = read_lines(out)
    assert [line["step"] for line in lines] == list(range(NUM_STEPS))
    assert repeatable(lines) == repeatable(read_lines(reference))
    actual, expected = run_ranks(read_checkpoints, 1, [out, reference])[0]
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal(actual[name], value) if torch.is_tensor(value) else actual[name] == value
        assert same, name


def kill_at_random_moment(job: Job, out: Path, draw: random.Random) -> str:
    """Wait for a random moment in a start, a step or a save, and kill one rank or all.

    Returns:
        A description of the moment and the killed ranks.
    """
    num_lines = len(read_lines(out))
    # The run must not finish before it is killed.
    is_near_end = num_lines > NUM_STEPS - 4 * SAVE_EVERY
    where = "start" if is_near_end else draw.choices(["save", "step", "start"], [5, 4, 1])[0]
    if where == "save":
        # When the second save starts, the first is complete. So half of these attempts leave a
        # checkpoint.
        seen = partial_checkpoints(out)
        expected = len(seen) + draw.randint(1, 2)

        def has_started() -> bool:
            seen.update(partial_checkpoints(out))
            return len(seen) >= expected

        job.wait_until(has_started)
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


def partial_checkpoints(out: Path) -> set[str]:
    return {p.name for p in out.glob("checkpoints/.iter_*.partial") if any(p.iterdir())}


def saved(out: Path) -> list[str]:
    return sorted(p.name for p in out.glob("checkpoints/iter_*"))
