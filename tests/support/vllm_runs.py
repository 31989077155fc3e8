"""Short runs on a GPU with a real vLLM server."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.conftest import REPO
from tests.support.tiny_runs import write_model, write_run


def train_on_gpu(folder: Path, **vllm: Any) -> Path:
    """Train for three steps on GPU 0, and return the run's folder.

    Args:
        vllm: settings of rollout.vllm.
    """
    path = write_run(
        folder,
        model={"dtype": "bf16"},
        training={"num_steps": 3, "global_batch_size": 4, "micro_batch_size": 2},
        rollout={
            "engine": "vllm",
            "max_response_tokens": 16,
            "vllm": {"python": os.environ.get("AROPD_VLLM_PYTHON"), **vllm},
        },
    )
    write_model(folder / "model", hidden_size=512, num_attention_heads=8)  # heads of 64
    done = subprocess.run(
        [sys.executable, "-m", "aropd_mcore.cli", "train", str(path)],
        env=os.environ | {"PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": "0"},
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len((folder / "out" / "metrics.jsonl").read_text().splitlines()) == 3
    return folder / "out"
