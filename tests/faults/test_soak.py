"""Steps for an hour: what a rank holds of memory, files and threads stays what it was.

`make soak`; AROPD_SOAK_MINUTES chooses another length.
"""

import os
import time
from pathlib import Path

import pytest

from tests.faults.jobs import Job
from tests.tiny_runs import write_run
from tests.trainer.test_resume import read_lines

NUM_RANKS = 2
SAMPLE_SECONDS = 10.0
MEMORY_TOLERANCE = 16 * 2**20
"""Bytes: an allocator's pools breathe, and a leak of 10 kB a step is more in an hour."""


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_a_rank_holds_no_more_after_an_hour(tmp_path):
    minutes = float(os.environ.get("AROPD_SOAK_MINUTES", "60"))
    path = write_run(
        tmp_path,
        training={"num_steps": 10**6},
        checkpoint={"save_every_steps": 20},
        parallel={"tensor": NUM_RANKS},
    )
    job = Job(path, NUM_RANKS)
    samples: list[list[dict[str, int]]] = []  # [moment][rank]
    try:
        job.wait_until(lambda: len(read_lines(tmp_path / "out")) >= 2)
        until = time.monotonic() + minutes * 60
        while time.monotonic() < until:
            time.sleep(SAMPLE_SECONDS)
            assert job.process.poll() is None, job.log.read_text()
            samples.append([held_by(job.pid_of(rank)) for rank in range(NUM_RANKS)])
    finally:
        job.end()

    num_steps = len(read_lines(tmp_path / "out"))
    print(f"\n{minutes:g} minutes, {num_steps} steps, the least and the most in each tenth")
    tenth = len(samples) // 10
    assert tenth >= 3, "too short to tell anything"
    grown = []
    for rank in range(NUM_RANKS):
        for what, tolerance in (("bytes", MEMORY_TOLERANCE), ("files", 0), ("threads", 0)):
            tenths = [
                [sample[rank][what] for sample in samples[start : start + tenth]]
                for start in range(0, 10 * tenth, tenth)
            ]
            print(f"rank {rank}: {what} {', '.join(f'{min(t):,}-{max(t):,}' for t in tenths)}")
            # The least: a save under way, which may take most of the time, has pipes and buffers.
            if min(tenths[-1]) > min(tenths[1]) + tolerance:
                grown.append(f"rank {rank}: {what}")
    assert not grown


def held_by(pid: int | None) -> dict[str, int]:
    """Resident bytes, open files and threads of a process."""
    process = Path(f"/proc/{pid}")
    fields = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    return {
        "bytes": int(fields["VmRSS"].split()[0]) * 1024,
        "files": len(list((process / "fd").iterdir())),
        "threads": int(fields["Threads"]),
    }
