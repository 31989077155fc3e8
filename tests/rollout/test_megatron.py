"""The engine `megatron` against the native one: the same tokens for the same seeds, on any layout.

Megatron's engine is the real one; flash-attn's place is taken by tests/paged_attention.py.
"""

import gc
from pathlib import Path

import pytest
import torch
from torch import Tensor

from aropd_mcore.config import (
    ConfigError,
    ParallelConfig,
    PrecisionConfig,
    RolloutConfig,
    SamplingConfig,
    check_engine_layout,
)
from aropd_mcore.mcore import runtime as mcore_runtime
from aropd_mcore.mcore.model import StageModel, build_model
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.mcore.weights import load_hf_weights
from aropd_mcore.rollout.engine import rollout_seed
from aropd_mcore.rollout.megatron import MegatronEngine
from aropd_mcore.rollout.native import NativeEngine
from aropd_mcore.types import Rollout
from tests.paged_attention import paged_attention
from tests.ranks import run_ranks
from tests.rollout.test_native import EOS, GREEDY, RANDOM, assert_same
from tests.tiny_models import save_tiny_model

FAMILIES = ("qwen2", "qwen3", "llama31", "qwen3_moe")
# With responses of 24 tokens most of the long ones go on in a second page; one fills its first.
LENGTHS = (250, 7, 251, 1, 240, 256, 100, 232)
PROMPTS = [[(31 * i + 7 * j * j) % 509 for j in range(n)] for i, n in enumerate(LENGTHS)]
SEEDS = [rollout_seed(1, position, 0) for position in range(len(PROMPTS))]


def load(
    folder: Path, *, dtype: torch.dtype = torch.float32, **sizes
) -> tuple[StageModel, Runtime]:
    runtime = mcore_runtime.start(**sizes)
    model = build_model(folder, runtime, dtype=dtype)
    load_hf_weights(model, folder, runtime)
    return model, runtime


def both(
    model: StageModel,
    runtime: Runtime,
    sampling: SamplingConfig,
    *,
    eos: tuple[int, ...] = EOS,
    rows: slice = slice(None),
    **limits,
) -> tuple[list[Rollout], list[Rollout]]:
    """What Megatron's engine samples, within these limits, and what the native one does."""
    native = NativeEngine(model, runtime, eos_token_ids=eos, batch_size=8)
    engine = MegatronEngine(model, runtime, eos_token_ids=eos, **{"batch_size": 8, **limits})
    with paged_attention():
        sampled = engine.generate(PROMPTS[rows], SEEDS[rows], sampling)
    return sampled, native.generate(PROMPTS[rows], SEEDS[rows], sampling)


def stopped_after(
    num_tokens: int, model: StageModel, runtime: Runtime, rows: slice
) -> list[Rollout]:
    """What there is of the responses when the rank that samples wants no more."""
    asked: list[None] = []

    def should_stop() -> bool:
        asked.append(None)
        return len(asked) > num_tokens

    engine = MegatronEngine(
        model, runtime, eos_token_ids=EOS, batch_size=8, should_stop=should_stop
    )
    with paged_attention():
        return engine.generate(PROMPTS[rows], SEEDS[rows], RANDOM)


def on_one_rank(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        model, runtime = load(folder)
        for sampling in (GREEDY, RANDOM):
            assert_same(*both(model, runtime, sampling))
        mcore_runtime.stop()

    model, runtime = load(folders["qwen2"])
    # More prompts than there is room for, in places and in pages. Those of 2 hold one long response
    # at a time, and of 3, one and a short one: what runs has to wait, and to be computed again.
    for limits in ({"batch_size": 3}, *({"kv_cache_tokens": n * 256 + 5} for n in (2, 3, 6))):
        assert_same(*both(model, runtime, RANDOM, **limits))

    _, free = both(model, runtime, RANDOM)
    # Tokens that sampling comes upon early in some rows and not in others.
    eos = (free[0].response_ids[3], free[2].response_ids[0], free[4].response_ids[9])
    for limits in ({}, {"batch_size": 2}):
        stopped, expected = both(model, runtime, RANDOM, eos=eos, **limits)
        assert_same(stopped, expected)
        assert len(stopped[2].response_ids) == 1
        assert {rollout.finished for rollout in stopped} == {True, False}


def on_layouts(folder: Path, layouts: list[dict]) -> list[list[Rollout]]:
    results = []
    for sizes in layouts:
        model, runtime = load(folder, **sizes)
        rows = slice(3 * runtime.dp_rank, None)  # replicas with prompts of their own
        stopped = stopped_after(5, model, runtime, rows)
        for limits in ({}, {"kv_cache_tokens": 3 * 256}):
            sampled, expected = both(model, runtime, RANDOM, rows=rows, **limits)
            assert_same(sampled, expected)
        assert [r.response_ids for r in stopped] == [r.response_ids[:5] for r in expected]
        results.append(sampled)
        mcore_runtime.stop()
    return results


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        save_tiny_model(family, root / family, tie=family == "qwen3")
    return {family: root / family for family in FAMILIES}


def test_seeds_give_the_native_engines_tokens_and_logprobs(folders):
    run_ranks(on_one_rank, 1, folders)


def test_every_layout_samples_the_same(folders):
    [expected] = run_ranks(on_layouts, 1, folders["qwen2"], [{}])[0]
    layouts = [{"tensor": 2}, {"tensor": 2, "sequence_parallel": True}, {"pipeline": 2}, {}]
    first, second = run_ranks(on_layouts, 2, folders["qwen2"], layouts)
    assert first[:3] == second[:3]
    for rollouts in first:
        assert_same(rollouts, expected)
    assert_same(second[3], expected[3:])  # the second replica
    for result in run_ranks(on_layouts, 4, folders["qwen2"], [{"tensor": 2, "pipeline": 2}]):
        assert_same(result[0], expected)
    experts = [{"tensor": 2, "sequence_parallel": True}]
    run_ranks(on_layouts, 2, folders["qwen3_moe"], experts)


def model_is_left_as_it_was(folder: Path) -> None:
    """Train, sample, train: as without the sampling; and what is sampled follows the weights."""
    model, runtime = load(folder)
    tokens = torch.tensor([PROMPTS[1]])
    positions = torch.arange(tokens.size(1))[None]
    modules = list(model.modules())
    # Its rotary tables are as long as training's, which finds them in Megatron's cache.
    engine = MegatronEngine(model, runtime, eos_token_ids=EOS, batch_size=3)
    short = SamplingConfig(max_response_tokens=1)

    def gradient() -> Tensor:
        model.zero_grad()
        model[0](tokens, positions, None).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    model.train()
    gc.collect()
    gc.disable()
    with paged_attention():
        engine.generate([PROMPTS[1][:-1]], SEEDS[:1], short)
    caches = [o for o in gc.get_objects() if isinstance(o, Tensor) and o.dim() == 6]
    assert not caches, "keys and values wait for the garbage collector"
    gc.enable()
    with paged_attention():
        first = gradient()
        before = engine.generate(PROMPTS, SEEDS, RANDOM)
        assert model.training and all(module.training for module in modules)
        assert list(model.modules()) == modules
        assert torch.equal(gradient(), first)

        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.05)
        engine.sync(3)
        after = engine.generate(PROMPTS, SEEDS, RANDOM)
    _, expected = both(model, runtime, RANDOM)
    assert_same(after, expected)
    assert [r.response_ids for r in after] != [r.response_ids for r in before]
    assert {r.weight_version for r in before} == {0} and {r.weight_version for r in after} == {3}

    model[0].decoder.layers[1].mlp.linear_fc2.weight.data[0, 0] = torch.nan
    with paged_attention(), pytest.raises(FloatingPointError, match="at weight version 3"):
        engine.generate(PROMPTS, SEEDS, RANDOM)
    model.eval()
    assert engine.generate([], [], GREEDY) == []
    small = MegatronEngine(model, runtime, eos_token_ids=EOS, batch_size=3, kv_cache_tokens=511)
    with pytest.raises(ValueError, match=r"up to 280 tokens, 2 pages of 256, and .* 511 holds 1"):
        small.generate(PROMPTS, SEEDS, RANDOM)


def test_sampling_leaves_the_model_as_it_was_and_follows_its_weights(folders):
    run_ranks(model_is_left_as_it_was, 1, folders["qwen2"])


def missing() -> str:
    from aropd_mcore.mcore.dynamic import check_dynamic

    with pytest.raises(ConfigError) as on_cpu:
        check_dynamic()
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(ConfigError, match="needs flash-attn"),
    ):
        patch.setattr(torch.cuda, "is_available", lambda: True)
        check_dynamic()
    return str(on_cpu.value)


def test_where_it_cannot_run_it_says_what_is_missing():
    assert "needs a GPU, and torch sees none" in run_ranks(missing, 1)[0]
    megatron = RolloutConfig(engine="megatron")
    check_engine_layout(megatron, ParallelConfig(tensor=2, sequence=True), PrecisionConfig())
    layout = ParallelConfig(pipeline=2, virtual_pipeline=2, context=2)
    with pytest.raises(
        ConfigError, match=r"found parallel.virtual_pipeline 2, parallel.context 2,"
    ):
        check_engine_layout(megatron, layout, PrecisionConfig(fp8="e4m3"))
    check_engine_layout(RolloutConfig(), layout, PrecisionConfig())
