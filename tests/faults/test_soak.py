"""Steps for an hour: what a rank holds of memory, files and threads stays what it was.

`make soak`; AROPD_SOAK_MINUTES chooses another length.
"""

import os
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.jobs import Job
from tests.support.tiny_runs import write_run

NUM_RANKS = 2
STEPS_A_SAVE = 20
WARM_UP_STEPS = 20 * STEPS_A_SAVE
"""By then what has a size of its own has grown to it: torch's record of the last 2000 collectives,
Megatron's 32 rotary tables, most of what malloc keeps at hand."""
LEAK = 10 * 2**10
"""Bytes a step that must not go unseen."""
TOLERANCE = 8 * 2**20
"""Bytes; malloc's heap grew by 4 MiB in the next 1200 steps, and then no more in 2000."""
SAMPLE_SECONDS = 5.0


class Sample(NamedTuple):
    num_steps: int
    held: list[dict[str, int]]
    """By each rank."""


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_a_rank_holds_no_more_after_an_hour(tmp_path):
    minutes = float(os.environ.get("AROPD_SOAK_MINUTES", "60"))
    path = write_run(
        tmp_path,
        training={"num_steps": 10**6},
        checkpoint={"save_every_steps": STEPS_A_SAVE},
        parallel={"tensor": NUM_RANKS},
    )
    job = Job(path, NUM_RANKS)
    samples: list[Sample] = []
    until = time.monotonic() + minutes * 60
    try:
        while time.monotonic() < until:
            time.sleep(SAMPLE_SECONDS)
            assert job.process.poll() is None, job.log.read_text()
            num_steps = steps_of(tmp_path / "out" / "metrics.jsonl")
            if num_steps >= WARM_UP_STEPS:
                held = [held_by(job.pid_of(rank)) for rank in range(NUM_RANKS)]
                samples.append(Sample(num_steps, held))
    finally:
        job.end()

    tenth = len(samples) // 10
    tenths = [samples[start * tenth : (start + 1) * tenth] for start in range(10)]
    assert tenth >= 3, f"too short: {len(samples)} samples after {WARM_UP_STEPS} steps"
    first, last = tenths[0], tenths[-1]
    num_steps = last[0].num_steps - first[-1].num_steps
    print(
        f"\n{minutes:g} minutes, {last[-1].num_steps} steps; the least and the most in each tenth "
        f"after the first {first[0].num_steps}"
    )
    grown = []
    for rank in range(NUM_RANKS):
        for what, tolerance in (("bytes", TOLERANCE), ("files", 0), ("threads", 0)):
            held = [[sample.held[rank][what] for sample in samples] for samples in tenths]
            print(f"rank {rank}: {what} {', '.join(f'{min(h):,}-{max(h):,}' for h in held)}")
            # The least: a save under way, which may take most of the time, has pipes and buffers.
            if min(held[-1]) > min(held[0]) + tolerance:
                grown.append(f"rank {rank}: {what}")
    assert not grown
    assert num_steps * LEAK > TOLERANCE, f"too short: {num_steps} steps would hide a leak"


def steps_of(metrics: Path) -> int:
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def held_by(pid: int | None) -> dict[str, int]:
    """Resident bytes, open files and threads of a process."""
    process = Path(f"/proc/{pid}")
    fields = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    return {
        "bytes": int(fields["VmRSS"].split()[0]) * 1024,
        "files": len(list((process / "fd").iterdir())),
        "threads": int(fields["Threads"]),
    }
