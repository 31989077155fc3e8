"""vLLM computes every family as transformers does, after it has loaded exported weights."""

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from aropd_mcore.rollout.vllm_command import HERE
from tests.support.tiny_models import FAMILIES, LATENT_YARN, TINY, save_tiny_model
from tests.vllm.server import environment
from tests.vllm.test_exported_folder import aropd

pytestmark = pytest.mark.vllm

# Sizes that vLLM's kernels for CPUs need: heads of 32 or more, experts of multiples of 32, and
# latent vectors of the published sizes.
SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 128}
WIDER: dict[str, Any] = {
    "head_dim": 64,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
}
"""Replaces the settings of a family that has them."""
GROUPS = {"n_group": 1, "topk_group": 1}
# Keys of the published models that the tiny ones lack, constants of vLLM, and what it refuses.
OTHER: dict[str, dict[str, Any]] = {
    "olmoe": {"rms_norm_eps": 1e-5},
    "qwen2_yarn": {"use_sliding_window": False},
    "gpt_oss": {"swiglu_limit": 7.0},
    "deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "deepseek_v2_lite": {"topk_method": "greedy", "scoring_func": "softmax", **GROUPS},
    "deepseek_v2": {"scoring_func": "softmax", "rope_scaling": LATENT_YARN},
    # vLLM takes rms_norm_eps also for the norms of latent vectors, transformers takes 1e-6. Without
    # YaRN, vLLM on CPUs gives other log-probs for any latent attention.
    "glm4_moe_lite": {
        "topk_method": "noaux_tc",
        "first_k_dense_replace": 1,
        "rms_norm_eps": 1e-6,
        "rope_scaling": LATENT_YARN,
    },
}
TOLERANCE = {"gpt_oss": 1e-2}
"""Differences of up to 0.006 nats were seen with gpt-oss. Their cause is not known."""
STACKED = ("gpt_oss",)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", FAMILIES)
def test_vllm_equals_transformers_after_an_update_of_weights(tmp_path: Path, family: str):
    original, other, exported = (tmp_path / name for name in ("hf", "other", "exported"))
    settings = FAMILIES[family][2]
    sizes = SIZES | {key: size for key, size in WIDER.items() if key in settings}
    sizes |= OTHER.get(family, {})
    save_tiny_model(family, original, **sizes)
    save_tiny_model(family, other, seed=1, **sizes)
    aropd("convert", "import", original, tmp_path / "mcore")
    aropd("convert", "export", tmp_path / "mcore", exported)

    generator = torch.Generator().manual_seed(2)
    prompts = [
        torch.randint(3, TINY["vocab_size"], (n,), generator=generator).tolist() for n in (1, 9, 40)
    ]
    # vLLM's servers do not update models with one HF tensor for all experts of a layer yet.
    updates = [exported] if family in STACKED else [other, exported]
    responses = respond(prompts, *updates)
    model: Any = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    for prompt, response in zip(prompts, responses, strict=True):
        ids = [token for token, _ in response]
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        logprobs_TV = logits.log_softmax(-1)
        expected_T = logprobs_TV[torch.arange(len(ids)), ids]
        actual_T = torch.tensor([logprob for _, logprob in response])
        # The second comparison: tokens are greedy, up to rounding.
        for values_T in (actual_T, logprobs_TV.amax(-1)):
            atol = TOLERANCE.get(family, 1e-3)
            torch.testing.assert_close(values_T, expected_T, rtol=0, atol=atol)


def respond(prompts: list[list[int]], *folders: Path) -> list[list[tuple[int, float]]]:
    """Return the responses of tests/vllm/offline.py."""
    with tempfile.TemporaryDirectory(prefix="vllm-") as scratch:
        done = subprocess.run(
            [os.environ["AROPD_VLLM_PYTHON"], Path(__file__).with_name("offline.py"), *folders],
            env=environment(scratch)
            | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "PYTHONPATH": str(HERE)},
            input=json.dumps(prompts),
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout)
