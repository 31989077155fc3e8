"""Megatron's dynamic engine with the real flash-attn: its log-probs are those of training.

On CPU ranks the engine is compared with the native one token for token, with a stand-in for
flash-attn (tests/rollout/test_megatron.py); in bf16 near ties differ, and responses with them.
"""

import pytest
import torch

from aropd_mcore.config import SamplingConfig
from aropd_mcore.mcore import runtime as mcore_runtime
from aropd_mcore.mcore.dynamic import check_dynamic
from aropd_mcore.mcore.logprobs import sequence_logprobs
from aropd_mcore.mcore.model import build_model
from aropd_mcore.mcore.weights import load_hf_weights
from aropd_mcore.rollout.engine import rollout_seed
from aropd_mcore.rollout.megatron import MegatronEngine
from tests.tiny_runs import write_model

pytestmark = pytest.mark.gpu

TOLERANCE = 0.1
"""Nats, on the average of a response's tokens; as rollout.vllm.probe_tolerance in bf16."""


def test_its_logprobs_are_those_of_the_training_forward(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    pytest.importorskip("flash_attn")
    check_dynamic()
    write_model(tmp_path, "qwen2", hidden_size=256, num_attention_heads=4, num_key_value_heads=2)
    runtime = mcore_runtime.start()
    model = build_model(tmp_path, runtime, dtype=torch.bfloat16)
    load_hf_weights(model, tmp_path, runtime)
    prompts = [
        [(31 * i + 7 * j * j) % 250 for j in range(n)] for i, n in enumerate((200, 7, 251, 1))
    ]
    seeds = [rollout_seed(1, position, 0) for position in range(len(prompts))]
    sampling = SamplingConfig(max_response_tokens=100)
    # Pages for two of the long ones: the others wait, or are computed again.
    for kv_cache_tokens in (None, 4 * 256):
        engine = MegatronEngine(
            model, runtime, eos_token_ids=(2,), batch_size=4, kv_cache_tokens=kv_cache_tokens
        )
        for prompt, rollout in zip(prompts, engine.generate(prompts, seeds, sampling), strict=True):
            ours = sequence_logprobs(model, runtime, [*prompt, *rollout.response_ids])
            theirs = torch.tensor(rollout.logprobs)
            assert (ours[len(prompt) - 1 :] - theirs).abs().mean() < TOLERANCE
    mcore_runtime.stop()
