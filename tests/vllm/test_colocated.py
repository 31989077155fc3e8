"""Training and a vLLM server that take turns on one GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import REPO
from tests.support.tiny_runs import write_model, write_run


@pytest.mark.gpu
@pytest.mark.vllm
@pytest.mark.timeout(900)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_train_with_colocated_server_completes(tmp_path: Path):
    """The run stops if the server's log-probs after sleep and reload differ from the trainer's."""
    vllm = {"python": os.environ.get("AROPD_VLLM_PYTHON"), "placement": "colocated"}
    path = write_run(
        tmp_path,
        model={"dtype": "bf16"},
        training={"num_steps": 3, "global_batch_size": 4, "micro_batch_size": 2},
        rollout={"engine": "vllm", "max_response_tokens": 16, "vllm": vllm},
    )
    write_model(tmp_path / "model", hidden_size=512, num_attention_heads=8)  # heads of 64
    done = subprocess.run(
        [sys.executable, "-m", "aropd_mcore.cli", "train", str(path)],
        env=os.environ | {"PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": "0"},
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 3
    log = (tmp_path / "out" / "vllm-0.log").read_text(errors="replace")
    assert log.count("to fall asleep") == 3, "expected one sleep per step"
