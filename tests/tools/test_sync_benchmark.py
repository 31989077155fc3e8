"""A run of tools/benchmarks/sync_counts.py, which compares counts of ranks with `aropd plan`'s."""

import os
import subprocess
import sys

import pytest

from tests.conftest import REPO

pytestmark = pytest.mark.rest


def test_sync_counts_of_ranks_equal_the_planned_ones():
    command = [sys.executable, str(REPO / "tools" / "benchmarks" / "sync_counts.py")]
    done = subprocess.run(
        [*command, "--layers", "2"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split("│")[1:-1] for line in done.stdout.splitlines() if line.startswith("│")]
    paths = [row[1].strip() for row in rows]
    assert paths.count("disk") == paths.count("nccl") == 7
