"""Steps for an hour: memory, open files and threads of each rank do not grow.

`make soak` runs the test. AROPD_SOAK_MINUTES sets another length.
"""

import os
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.jobs import Job
from tests.support.tiny_runs import write_run

NUM_RANKS = 2
STEPS_PER_SAVE = 20
WARM_UP_STEPS = 20 * STEPS_PER_SAVE
"""Number of steps after which buffers of limited size have reached it: torch's record of the last
2000 collectives, Megatron's 32 rotary tables, and most of malloc's free lists."""
LEAK = 10 * 2**10
"""Bytes per step that the test must detect."""
TOLERANCE = 8 * 2**20
"""Allowed growth in bytes. malloc's heap grew by 4 MiB in the 1200 steps after the warm-up, and not
in the following 2000."""
SAMPLE_SECONDS = 5.0


class Sample(NamedTuple):
    num_steps: int
    usage: list[dict[str, int]]
    """Usage of each rank."""


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_rank_after_an_hour_uses_no_more_memory_files_or_threads(tmp_path):
    minutes = float(os.environ.get("AROPD_SOAK_MINUTES", "60"))
    path = write_run(
        tmp_path,
        training={"num_steps": 10**6},
        checkpoint={"save_every_steps": STEPS_PER_SAVE},
        parallel={"tensor": NUM_RANKS},
    )
    job = Job(path, NUM_RANKS)
    samples: list[Sample] = []
    until = time.monotonic() + minutes * 60
    try:
        while time.monotonic() < until:
            time.sleep(SAMPLE_SECONDS)
            assert job.process.poll() is None, job.log.read_text()
            num_steps = count_steps(tmp_path / "out" / "metrics.jsonl")
            if num_steps >= WARM_UP_STEPS:
                usage = [process_usage(job.pid_of(rank)) for rank in range(NUM_RANKS)]
                samples.append(Sample(num_steps, usage))
    finally:
        job.end()

    tenth = len(samples) // 10
    tenths = [samples[start * tenth : (start + 1) * tenth] for start in range(10)]
    assert tenth >= 3, f"too short: {len(samples)} samples after {WARM_UP_STEPS} steps"
    first, last = tenths[0], tenths[-1]
    num_steps = last[0].num_steps - first[-1].num_steps
    print(
        f"\n{minutes:g} minutes, {last[-1].num_steps} steps; minimum and maximum in each tenth "
        f"after the first {first[0].num_steps} steps"
    )
    grown = []
    for rank in range(NUM_RANKS):
        for kind, tolerance in (("bytes", TOLERANCE), ("files", 0), ("threads", 0)):
            usage = [[sample.usage[rank][kind] for sample in samples] for samples in tenths]
            print(f"rank {rank}: {kind} {', '.join(f'{min(u):,}-{max(u):,}' for u in usage)}")
            # The minimum, because a save in progress has pipes and buffers for much of the time.
            if min(usage[-1]) > min(usage[0]) + tolerance:
                grown.append(f"rank {rank}: {kind}")
    assert not grown
    assert num_steps * LEAK > TOLERANCE, f"too short: {num_steps} steps would hide a leak"


def count_steps(metrics: Path) -> int:
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def process_usage(pid: int | None) -> dict[str, int]:
    """Return resident bytes, open files and threads of a process."""
    process = Path(f"/proc/{pid}")
    fields = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    return {
        "bytes": int(fields["VmRSS"].split()[0]) * 1024,
        "files": len(list((process / "fd").iterdir())),
        "threads": int(fields["Threads"]),
    }
