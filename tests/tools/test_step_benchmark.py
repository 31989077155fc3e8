"""A run of the step's benchmark that takes seconds. Counts are checked, and times are not."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import REPO

pytestmark = pytest.mark.matrix

TINY = ["views.max_prompt_tokens=12", "rollout.max_response_tokens=6"]
METHODS = {"AR-OPD", "AR-OPD, no metrics", "Full OPD, one view", "SFT"}


def test_every_method_size_and_pipeline_is_measured(tmp_path):
    path = tmp_path / "figures.json"
    command = [sys.executable, str(REPO / "tools" / "benchmarks" / "step.py"), *TINY]
    command += ["--repeats", "1", "--json", str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    figures = json.loads(path.read_text())

    steps = figures["steps"]
    assert steps.keys() == METHODS | {
        f"{factor} x {what}" for factor in (2, 4) for what in ("response tokens", "microbatches")
    }
    for name, row in steps.items():
        assert name in done.stdout
        phases = set(row["bytes"]) - {"state", "peak"}
        distilled = {"rollout", "teacher"} if name != "SFT" else set()
        assert phases == {"student", "optimizer"} | distilled
        assert row["bytes"]["peak"] == max(row["bytes"].values()) > row["bytes"]["state"] > 0
        parts = {"rollout", "batch", "teacher", "student", "optimizer", "sync"}
        assert set(row["seconds"]) == {*parts, "step"}
        assert row["seconds"]["step"] > 0
    # SFT has no teacher, whose weights are 5.2 million parameters in fp32.
    state = {name: steps[name]["bytes"]["state"] for name in METHODS}
    assert state["AR-OPD"] - state["SFT"] > 15e6

    for kind in ("products", "attention"):
        for part in ("teacher", "student forward"):
            forward = figures["forward"]
            assert forward[f"{part}, executed"][kind] == forward[f"{part}, planned"][kind]
    executed, planned = (forward[f"student, {how}"] for how in ("executed", "planned"))
    assert executed["products"] == planned["products"]

    for row in figures["bubble"]:
        pipeline, num_views = row["pipeline"], 2 * row["microbatches"]
        assert row["views"] == num_views
        assert row["expected"] == (pipeline - 1) / (num_views + pipeline - 1)
        assert row["from"] <= row["measured"] <= row["to"] < 1
        # The wait before the first view and after the last one. Other ranks only add to it.
        assert row["measured"] > 0.9 * row["expected"]
    assert {row["pipeline"] for row in figures["bubble"] if row["stage_seconds"]} == {2, 4}
