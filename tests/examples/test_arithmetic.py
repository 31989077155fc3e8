"""examples/arithmetic: the scripts of `make demo` except training, with an untrained model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO

pytestmark = pytest.mark.rest

EXAMPLE = Path("examples/arithmetic")


def test_scripts_write_data_model_and_evaluation(tmp_path: Path):
    script("make_data.py", tmp_path / "data")
    script("make_model.py", tmp_path / "model")
    heldout = (tmp_path / "data" / "heldout.jsonl").read_text().splitlines(keepends=True)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(heldout[:8]))
    out = tmp_path / "evaluation.json"
    script("evaluate.py", EXAMPLE / "aropd.yaml", rows, tmp_path / "model", "--out", out)
    [result] = json.loads(out.read_text()).values()
    assert result["accuracy"] == 0, "expected 0 for a random model"
    assert 0 < result["response_length"] <= 48
    assert 0 <= result["hindsight_token_rate"] <= 1


def script(name: str, *arguments: object) -> None:
    subprocess.run([sys.executable, EXAMPLE / name, *map(str, arguments)], cwd=REPO, check=True)
