"""Parameters of a rank, compared with the whole model and with built models."""

from itertools import product

import pytest

from aropd_mcore.config import Config
from aropd_mcore.convert.architecture import read_architecture
from aropd_mcore.plan.parameters import rank_parameters, vocabulary_columns
from aropd_mcore.plan.setup import Setup
from tests.conftest import REPO
from tests.support.ranks import run_ranks

TINY = {
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 509,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
}
MODELS = {
    "qwen2": {**TINY, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen2, tied": {
        **TINY,
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "tie_word_embeddings": True,
    },
    "qwen3": {**TINY, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 24},
    "qwen3_moe": {
        **TINY,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "head_dim": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "norm_topk_prob": True,
    },
    "gpt_oss": {
        **TINY,
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "head_dim": 24,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    },
}
PUBLISHED = {
    "Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen3-32B": 32_762_123_264,
    "Llama-3.1-70B-Instruct": 70_553_706_496,
    "Qwen3-235B-A22B": 235_093_634_560,
    "gpt-oss-20b": 20_914_757_184,
    "DeepSeek-V3": 671_026_404_352,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_published_models_equal_their_published_number(name: str):
    folder = REPO / "examples" / "clusters" / name
    assert read_architecture(folder).num_parameters == PUBLISHED[name]


@pytest.mark.parametrize("name", MODELS)
def test_parameters_of_all_ranks_add_up_to_the_model(name: str):
    """Parameters that all tensor ranks repeat are counted once: norms, router and experts."""
    architecture = read_architecture(MODELS[name])
    sizes, routing = architecture.sizes, architecture.routing
    for tensor, pipeline, expert in product((1, 2, 4), (1, 2, 4), (1, 2) if routing else (1,)):
        setup = Setup(architecture, tensor=tensor, pipeline=pipeline, expert=expert, data=8)
        stages = [rank_parameters(setup, stage) for stage in range(pipeline)]
        if routing and expert == 1:
            assert not any(p.experts for p in stages)
        biases = architecture.has_expert_bias
        expert_weights = 4 * 3 * sizes["hidden"] * sizes["expert_ffn"] * sizes["experts"]
        if biases:
            columns = sizes["hidden"] + sizes["expert_gate_up"]
            expert_weights += 4 * columns * sizes["experts"]
        own_experts = expert_weights // expert
        repeated = sizes["hidden"] * (2 * 4 + 1)
        repeated += 2 * 4 * sizes["head"] if architecture.has_qk_norm else 0
        repeated += 4 * sizes["hidden"] * sizes["experts"] if routing else 0
        repeated += 4 * (sizes["hidden"] + sizes["experts"]) if biases else 0
        split = sum(p.total for p in stages) - repeated - own_experts
        padding = vocabulary_columns(setup) * tensor - sizes["vocab"]
        copies = 2 if pipeline > 1 or not architecture.tied_embeddings else 1
        extra = padding * sizes["hidden"] * copies
        if architecture.tied_embeddings and pipeline > 1:
            extra += sizes["vocab"] * sizes["hidden"]
        total = split * tensor + repeated + own_experts * expert
        assert total == architecture.num_parameters + extra


LAYOUTS = [
    ("qwen2", {"tensor": 2, "pipeline": 2}),
    ("qwen2, tied", {"tensor": 1, "pipeline": 4}),
    ("qwen3", {"tensor": 4}),
    ("qwen3_moe", {"tensor": 2, "sequence": True, "pipeline": 2}),
    ("qwen3_moe", {"tensor": 2, "sequence": True, "expert": 4}),
    ("qwen3_moe", {"tensor": 2, "sequence": True, "expert": 2, "expert_tensor": 2}),
    ("gpt_oss", {"tensor": 2, "sequence": True, "expert": 2}),
]


@pytest.mark.rest
def test_planned_parameters_equal_those_of_built_models():
    counted_by_layout = zip(*run_ranks(_count, 4), strict=True)
    for (name, layout), counts in zip(LAYOUTS, counted_by_layout, strict=True):
        size = layout.get("tensor", 1) * layout.get("pipeline", 1)
        setup = Setup(read_architecture(MODELS[name]), **layout, data=4 // size)
        for stage, counted in counts:
            assert rank_parameters(setup, stage).total == counted, (name, layout, stage)


def _count() -> list[tuple[int, int]]:
    import torch

    from aropd_mcore.mcore import runtime as mcore_runtime
    from aropd_mcore.mcore.model import build_model
    from aropd_mcore.trainer.build import start_runtime

    counts = []
    for name, layout in LAYOUTS:
        config = Config.model_validate(
            {
                "output_dir": "unused",
                "model": {"path": "unused"},
                "data": {"train": ["unused"]},
                "training": {"num_steps": 1},
                "parallel": layout,
            }
        )
        runtime = start_runtime(config)
        model = build_model(MODELS[name], runtime, dtype=torch.float32)
        counts.append((runtime.pp_rank, sum(p.numel() for p in model.parameters())))
        mcore_runtime.stop()
    return counts
