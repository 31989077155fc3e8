"""`aropd eval` with a real vLLM server that it starts writes the native engine's files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import REPO
from tests.support.tiny_runs import tiny_config, write_model

pytestmark = pytest.mark.vllm
OUTPUTS = ("samples.jsonl", "summary.json")


@pytest.mark.timeout(900)
def test_eval_with_vllm_equals_native(tmp_path):
    # The smallest head size of vLLM's attention on CPU is 32.
    write_model(tmp_path / "model", hidden_size=256, num_attention_heads=8)
    problems = [{"problem": f"{i} + {i * i}?", "answer": i + i * i} for i in range(12)]
    lines = "".join(json.dumps(problem) + "\n" for problem in problems)
    (tmp_path / "sums.jsonl").write_text(lines)
    config = tiny_config(tmp_path / "model", tmp_path / "sums.jsonl", tmp_path / "out")
    config["rollout"]["vllm"] = {
        "python": os.environ["AROPD_VLLM_PYTHON"],
        "arguments": ["--enforce-eager"],
        "start_timeout": 300.0,
    }
    (tmp_path / "vllm.yaml").write_text(yaml.safe_dump(config))
    native, vllm = (evaluate(tmp_path, engine) for engine in ("native", "vllm"))
    assert native[0].count(b"\n") == len(problems)
    assert vllm == native


def evaluate(folder: Path, engine: str) -> list[bytes]:
    out = folder / engine
    files = ["--model", folder / "model", "--task", f"sums={folder / 'sums.jsonl'}", "--out", out]
    options = ["--config", folder / "vllm.yaml", "--max-response-tokens", "16", "--engine", engine]
    done = subprocess.run(
        [sys.executable, "-m", "aropd_mcore.cli", "eval", *files, *options, "--dtype", "fp32"],
        env=os.environ
        | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [(out / name).read_bytes() for name in OUTPUTS]
