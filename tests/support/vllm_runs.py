"""Short runs on a GPU with a real vLLM server."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.conftest import REPO
from tests.support.tiny_adapters import write_adapter
from tests.support.tiny_runs import write_model, write_run

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def train_on_gpu(
    folder: Path, family: str = "qwen2", *, adapter: bool = False, **vllm: Any
) -> Path:
    """Train for three steps on GPU 0, and return the run's folder.

    Args:
        adapter: train an adapter, from a random one that changes log-probs by more than a nat.
        vllm: settings of rollout.vllm.
    """
    sections: dict[str, Any] = {}
    if adapter:
        sections["adapter"] = {"rank": 4, "alpha": 8, "path": str(folder / "adapter")}
    path = write_run(
        folder,
        **sections,
        model={"dtype": "bf16"},
        training={"num_steps": 3, "global_batch_size": 4, "micro_batch_size": 2},
        rollout={
            "engine": "vllm",
            "max_response_tokens": 16,
            "vllm": {"python": os.environ.get("AROPD_VLLM_PYTHON"), **vllm},
        },
    )
    # Heads of 64.
    model = write_model(folder / "model", family, hidden_size=512, num_attention_heads=8)
    if adapter:
        write_adapter(folder / "adapter", model, targets=TARGETS)
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
