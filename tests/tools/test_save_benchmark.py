"""tools/benchmarks/save.py at a size of seconds: that it measures, not what."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import REPO

pytestmark = pytest.mark.rest


def test_both_ways_of_saving_are_measured(tmp_path):
    command = [sys.executable, str(REPO / "tools" / "benchmarks" / "save.py")]
    sizes = ["--layers", "1", "--steps", "2", "--repeats", "1", "--ranks", "1"]
    figures = tmp_path / "figures.json"
    done = subprocess.run(
        [*command, *sizes, "--folder", str(tmp_path), "--json", str(figures)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    assert found["bytes"] > 50e6  # 5 x 4 bytes a parameter, most of them in the embeddings
    assert found["blocked"]["no save"][0] < found["blocked"]["waiting for the disk"][0]
    assert "of the waiting" in done.stdout
