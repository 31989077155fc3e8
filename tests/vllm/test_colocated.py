"""Training and a vLLM server that take turns on one GPU."""

from pathlib import Path

import pytest
import torch

from tests.support.vllm_runs import train_on_gpu


@pytest.mark.gpu
@pytest.mark.vllm
@pytest.mark.timeout(900)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("family", "adapter"), [("qwen2", False), ("qwen2", True), ("qwen3_moe", True)]
)
def test_train_with_colocated_server_completes(tmp_path: Path, family: str, adapter: bool):
    """The run stops if the server's log-probs after sleep and reload differ from the trainer's."""
    out = train_on_gpu(tmp_path, family, adapter=adapter, placement="colocated")
    log = (out / "vllm-0.log").read_text(errors="replace")
    assert log.count("to fall asleep") == 3, "expected one sleep per step"
