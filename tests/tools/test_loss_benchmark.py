"""A run of the loss's benchmark that takes seconds. Its times are not checked."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.conftest import REPO

pytestmark = pytest.mark.rest

METHODS = ["dense", "vocabulary chunks", "ours", "ours, metrics", "ours, metrics, top-k"]


def test_every_method_is_measured_and_agrees_with_the_dense_formula(tmp_path):
    """Runs on one rank and on two. A method with a wrong loss or gradient stops the benchmark."""
    command = [sys.executable, str(REPO / "tools" / "benchmarks" / "loss.py")]
    command += ["--out", str(tmp_path), "--device", "cpu", "--repeats", "2", "--tp", "2"]
    command += ["--neighbours", "1"]
    command += ["--tokens", "40", "--hidden", "16", "--vocab", "600", "--divergence", "jsd"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    for method in METHODS:
        assert method in done.stdout

    figures = json.loads((tmp_path / "loss.json").read_text())
    assert figures["machine"]["torch"] == torch.__version__
    assert figures["settings"]["neighbours"] == 1 and figures["points"][0]["load"] > 0
    assert figures["bars"] == []  # bars apply to one size only
    single, sharded = figures["points"]
    assert (single["tp"], sharded["tp"]) == (1, 2)
    for form in ("hidden", "logits"):
        rows = {row["method"]: row for row in single["rows"] if row["form"] == form}
        assert list(rows) == METHODS
        for row in rows.values():
            assert len(row["seconds"]) == 2 and row["median"] > 0 and row["peak_bytes"] > 0
            assert row["collectives"]["forward"]["calls"] == 0
        rows = {row["method"]: row for row in sharded["rows"] if row["form"] == form}
        assert list(rows) == METHODS[2:]
        for name, row in rows.items():
            numbers = {"ours": 6, "ours, metrics": 12, "ours, metrics, top-k": 47}[name] + 6 + 2
            gradient, calls = (16, 4) if form == "hidden" else (0, 3)
            expected = {"calls": calls, "bytes": 4 * 40 * (numbers + gradient)}
            assert row["collectives"] == {
                "forward": expected,
                "backward": {"calls": 0, "bytes": 0},
            }
    assert (tmp_path / "loss.png").stat().st_size > 10_000
