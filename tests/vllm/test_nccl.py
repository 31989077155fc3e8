"""Transfer of weights from the trainer's GPU to a vLLM server's GPU by NCCL."""

from pathlib import Path

import pytest
import torch

from tests.support.vllm_runs import train_on_gpu


@pytest.mark.gpu
@pytest.mark.vllm
@pytest.mark.timeout(900)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_train_with_nccl_sync_completes(tmp_path: Path):
    """The run stops if the server's log-probs differ from the trainer's after a step."""
    out = train_on_gpu(tmp_path, devices=["1"], sync="nccl")
    assert not list(out.glob("vllm-weights/*")), "expected no weight files"
