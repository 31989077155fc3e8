"""Decoding by CUDA graphs with Transformer Engine's layers, against decoding without graphs."""

from pathlib import Path

import pytest
import torch

from aropd_mcore.config import SamplingConfig
from aropd_mcore.mcore import runtime as mcore_runtime
from aropd_mcore.mcore.model import build_model
from aropd_mcore.mcore.weights import load_hf_weights
from aropd_mcore.rollout.native import NativeEngine
from tests.support.gpu import require_gpu
from tests.support.ranks import run_ranks
from tests.support.rollouts import sample
from tests.support.tiny_models import save_tiny_model

pytestmark = pytest.mark.gpu

LENGTHS = (7, 1, 190, 4, 120)
PROMPTS = [[(31 * i + 7 * j * j) % 500 for j in range(n)] for i, n in enumerate(LENGTHS)] * 2
SAMPLING = SamplingConfig(temperature=1.3, top_p=0.98, max_response_tokens=200)
EOS = tuple(range(0, 500, 100))


def engines_agree(folder: Path) -> None:
    runtime = mcore_runtime.start()
    model = build_model(folder, runtime, dtype=torch.bfloat16)
    load_hf_weights(model, folder, runtime)
    plain, graphed = (
        NativeEngine(model, runtime, eos_token_ids=EOS, batch_size=4, cuda_graphs=is_graphed)
        for is_graphed in (False, True)
    )
    assert plain._graphs is None and graphed._graphs is not None
    for _ in range(3):
        expected = sample(plain, PROMPTS, range(10), SAMPLING)
        for _ in range(2):  # plain and captured, then replayed
            rollouts = sample(graphed, PROMPTS, range(10), SAMPLING)
            assert [r.response_ids for r in rollouts] == [r.response_ids for r in expected]
            for ours, theirs in zip(rollouts, expected, strict=True):
                assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-2)
        assert graphed._graphs._can_capture and len(graphed._graphs._replays) > 2
        with torch.no_grad():  # an update, which keeps addresses
            for parameter in model.parameters():
                parameter.mul_(1.05)


def test_captured_steps_sample_the_same_tokens_also_after_updates(tmp_path):
    require_gpu(by_dry_run=True)  # tests/rollout/test_graphs.py replays steps on a CPU
    save_tiny_model(
        "qwen2",
        tmp_path / "model",
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )
    run_ranks(engines_agree, 1, tmp_path / "model")
