"""Checks of `plan` before any process starts."""

from pathlib import Path
from typing import Any

import pytest

from aropd_mcore.config import Config, ConfigError
from aropd_mcore.plan.layout import Layout, plan
from tests.support.tiny_models import save_tiny_model
from tests.support.tiny_runs import tiny_config


def config(folder: Path, family: str, **sections: dict[str, Any]) -> Config:
    save_tiny_model(family, folder)
    model = sections.pop("model", {})
    tree = tiny_config(folder, folder / "rows.jsonl", folder / "out", **sections)
    tree["model"] |= model
    return Config.model_validate(tree)


def test_plan_returns_the_layout(tmp_path: Path):
    run = config(tmp_path, "mistral", views={"max_prompt_tokens": 32}, parallel={"pipeline": 2})
    layout = plan(run, 4)
    assert layout == Layout(
        4, 1, 2, 1, data=2, microbatches_per_step=2, num_parameters=layout.num_parameters
    )


def test_plan_of_sequences_beyond_the_positions_is_refused(tmp_path: Path):
    """The models have 512 positions. Context ranks limit Mistral to its sliding window of 10."""
    lengths = {"views": {"max_prompt_tokens": 500}, "rollout": {"max_response_tokens": 12}}
    plan(config(tmp_path, "llama", **lengths), 1)
    for family, context, positions in (("llama", 1, 512), ("mistral", 1, 512), ("mistral", 2, 10)):
        lengths["rollout"] = {"max_response_tokens": 13}
        message = (
            r"max_prompt_tokens 500 \+ rollout\.max_response_tokens 13 = 513 tokens: expected at "
            rf"most {positions},"
        )
        with pytest.raises(ConfigError, match=message):
            plan(config(tmp_path, family, parallel={"context": context}, **lengths), context)


def test_plan_of_experts_with_tensor_but_not_sequence_parallelism_is_refused(tmp_path: Path):
    plan(config(tmp_path, "mixtral", parallel={"tensor": 2, "sequence": True}), 2)
    with pytest.raises(ConfigError, match=r"parallel.tensor 2 without .*\(MixtralForCausalLM\)"):
        plan(config(tmp_path, "mixtral", parallel={"tensor": 2}), 2)


def test_plan_of_experts_with_biases_over_expert_tensor_ranks_or_vllm_is_refused(tmp_path: Path):
    plan(config(tmp_path, "gpt_oss", parallel={"expert": 2, "context": 2}), 2)
    with pytest.raises(ValueError, match=r"^parallel.expert_tensor 2 with experts that have"):
        plan(config(tmp_path, "gpt_oss", parallel={"expert_tensor": 2}), 2)
    with pytest.raises(ConfigError, match=r"rollout.engine vllm: expected native for GptOss"):
        plan(config(tmp_path, "gpt_oss", rollout={"engine": "vllm"}), 1)


def test_plan_of_router_losses_without_routers_is_refused(tmp_path: Path):
    losses = {"objective": {"router_z_loss_coeff": 0.001}}
    plan(config(tmp_path, "mixtral", **losses), 1)
    with pytest.raises(ConfigError, match=r"router_z_loss_coeff 0.001: .*\(Qwen2ForCausalLM\)"):
        plan(config(tmp_path, "qwen2", **losses), 1)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {
                "parallel": {"pipeline": 2, "virtual_pipeline": 2},
                "training": {"micro_batch_size": 8},
            },
            r"^1 microbatches per step .* a multiple of parallel.pipeline 2, as .*virtual_pipe",
        ),
        (
            {"parallel": {"expert": 4}},
            r"^2 processes per pipeline stage: expected a multiple of parallel.expert 4, the",
        ),
        (
            {"parallel": {"expert": 2, "expert_tensor": 2}},
            r"expected a multiple of parallel.expert 2 x parallel.expert_tensor 2, the ranks",
        ),
        (
            {"parallel": {"expert_tensor": 4}},
            r"a multiple of parallel.expert_tensor 4, .* the number of processes or this setting$",
        ),
        (
            {"training": {"packing": True, "max_tokens_per_microbatch": 140}},
            r"max_tokens_per_microbatch 140: .* 128 \+ .* 16, and 4 of padding",
        ),
        (
            {"rollout": {"kv_cache_tokens": 140}},
            r"^rollout.kv_cache_tokens 140: expected at least .* 128 \+ .* 16; raise it",
        ),
        (
            {"precision": {"fp8": "hybrid"}, "model": {"dtype": "bf16"}},
            r"parallel.expert_tensor 1 = 40: expected a multiple of 16 .* FP8 \(.*tensorwise",
        ),
    ],
    ids=["virtual pipeline", "experts", "both", "cut experts", "packing", "KV cache", "fp8"],
)
def test_plan_refuses_sizes_that_do_not_divide(tmp_path: Path, sections, message):
    world_size = 2
    with pytest.raises(ConfigError, match=message):
        plan(config(tmp_path, "qwen3_moe", **sections), world_size)


def test_plan_with_packing_leaves_the_number_of_microbatches_open(tmp_path: Path):
    packing = {"packing": True, "max_tokens_per_microbatch": 200, "micro_batch_size": 8}
    layout = plan(config(tmp_path, "llama", training=packing), 2)
    assert layout.microbatches_per_step is None
