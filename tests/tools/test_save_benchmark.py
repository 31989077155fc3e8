"""Runs of tools/benchmarks/save.py and save_counts.py that take seconds. Times are not compared."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import REPO

pytestmark = pytest.mark.rest


def test_synchronous_and_asynchronous_saves_are_measured(tmp_path):
    command = [sys.executable, str(REPO / "tools" / "benchmarks" / "save.py")]
    sizes = ["--layers", "1", "--steps", "2", "--repeats", "1", "--ranks", "1"]
    path = tmp_path / "figures.json"
    done = subprocess.run(
        [*command, *sizes, "--folder", str(tmp_path), "--json", str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(path.read_text())
    assert figures["bytes"] > 50e6  # 5 x 4 bytes per parameter, mostly embeddings
    assert figures["blocked"]["no save"][0] < figures["blocked"]["waiting for the disk"][0]
    assert "of the wait" in done.stdout


def test_save_counts_prints_equal_shares_and_single_reads(tmp_path):
    command = [sys.executable, str(REPO / "tools" / "benchmarks" / "save_counts.py")]
    done = subprocess.run(
        [*command, "--ranks", "2", "--layers", "1", "--folder", str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[1].split()[-3:] == ["1.00", "to", "1.00"]
    assert "checksums read 1.00 of the checkpoint, the load 1.00 and" in lines[3]
