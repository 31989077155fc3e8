"""`aropd generate` with a real vLLM server that it starts, from a run's checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from aropd_mcore.config_file import load_config
from tests.conftest import REPO
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import write_model, write_run

pytestmark = pytest.mark.vllm


@pytest.mark.timeout(900)
def test_generate_teacher_with_vllm_equals_native(tmp_path):
    path = write_run(tmp_path, training={"num_steps": 2, "global_batch_size": 4})
    # The smallest head size of vLLM's attention on CPU is 32.
    write_model(tmp_path / "model", hidden_size=256, num_attention_heads=8)
    run_ranks(train_on_rank, 2, path)
    config = yaml.safe_load(path.read_text())
    config["rollout"]["vllm"] = {
        "python": os.environ["AROPD_VLLM_PYTHON"],
        "arguments": ["--enforce-eager"],
        "start_timeout": 300.0,
    }
    (tmp_path / "vllm.yaml").write_text(yaml.safe_dump(config))
    native, vllm = (generate(tmp_path, engine) for engine in ("native", "vllm"))
    assert len(native) == 24
    for line, other in zip(vllm, native, strict=True):
        logprobs = line.pop("logprobs"), other.pop("logprobs")
        assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-3)
        assert line == other


def train_on_rank(path: Path) -> None:
    from aropd_mcore.trainer.build import start_runtime
    from aropd_mcore.trainer.loop import train

    config = load_config(path, ["parallel.tensor=2"])
    train(config, start_runtime(config))


def generate(folder: Path, engine: str) -> list[dict]:
    out = folder / f"{engine}.jsonl"
    files = ["--model", folder / "out", "--prompts", folder / "rows.jsonl", "--out", out]
    options = ["--weights", "teacher", "--config", folder / "vllm.yaml", "--temperature", "0"]
    options += ["--max-response-tokens", "16", "--logprobs", "--engine", engine]
    done = subprocess.run(
        [sys.executable, "-m", "aropd_mcore.cli", "generate", *files, *options],
        env=os.environ
        | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not out.with_name(out.name + ".partial").exists()
    return [json.loads(line) for line in out.read_text().splitlines()]
