"""Tests of training on a GPU: Transformer Engine's layers, flash attention, FP8, host teacher.

Each run takes ten steps from the same weights on the same responses: the oracle's (`sft`), or those
that the bf16 run sampled (`aropd`). Losses therefore differ only by arithmetic, which also changes
the weights over the steps. The bands limit the difference at every step, relative to the bf16 run's
loss.

On a CPU, bf16 differs from fp32 by at most 0.7 % (`sft`) and 6 % (`aropd`). The `aropd` loss is a
KL of 0.1 nats between nearly equal models, to which every rounding error adds. Its learning rate is
low for the same reason.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from aropd_mcore.config import Config, ConfigError, PrecisionConfig
from aropd_mcore.mcore.fp8 import check_fp8
from aropd_mcore.types import Rollout
from tests.support.gpu import IS_DRY, require_gpu
from tests.support.rollouts import ReplaySource, sample
from tests.support.tiny_runs import tiny_config, write_model, write_rows

pytestmark = pytest.mark.gpu

NUM_STEPS = 2 if IS_DRY else 10
BF16_BAND = {"sft": 0.02, "aropd": 0.1}
"""Relative difference allowed between bf16 and fp32, and between packed and padded bf16."""
FP8_BAND = {"sft": 0.05, "aropd": 0.25}
METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "sft": {"objective": {"name": "sft"}, "optimizer": {"lr": 1e-3}},
    "aropd": {"optimizer": {"lr": 1e-6}},
}
BOTH = pytest.mark.parametrize("method", METHODS)
RECIPES = ["tensorwise", "delayed", "blockwise", "mxfp8"]
FAMILIES = {
    # Head dimensions that flash attention supports, and sizes that FP8 supports.
    "qwen2": {"head_dim": 64},
    "qwen3_moe": {"head_dim": 64, "moe_intermediate_size": 128},
}
PACKED = {"packing": True, "max_tokens_per_microbatch": 800}


@pytest.fixture(scope="module", autouse=True)
def transformer_engine() -> Iterator[None]:
    """Require Transformer Engine, and make attention without flash or fused kernel fail."""
    require_gpu()
    if not torch.cuda.is_available():
        yield  # a dry run trains with Megatron's local layers
        return
    pytest.importorskip("transformer_engine.pytorch")
    from transformer_engine.pytorch.attention.dot_product_attention import backends

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("expected flash or fused attention")

    # NVTE_UNFUSED_ATTN=0 would have this effect, but Megatron refuses it (language_module.py:118).
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends.UnfusedDotProductAttention, "forward", refuse)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    write_rows(folder / "rows.jsonl")
    for family, settings in FAMILIES.items():
        sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
        sizes |= {"num_key_value_heads": 2, "initializer_range": 0.05}
        write_model(folder / family, family, **sizes | settings)
    return folder


@dataclass(frozen=True)
class Steps:
    """Results of a run."""

    losses: list[float]
    rollouts: list[list[Rollout]]
    """Rollouts of each step."""
    teacher: dict[str, torch.Tensor]
    """Final weights of the teacher. Empty for `sft`."""


class Bf16Runs(dict[tuple[str, str], Steps]):
    """Results in bf16 by family and method. Each run takes place at its first use."""

    def __init__(self, root: Path):
        super().__init__()
        self._root = root

    def __missing__(self, key: tuple[str, str]) -> Steps:
        self[key] = take_steps(self._root, *key)
        return self[key]


@pytest.fixture(scope="module")
def bf16(root) -> Bf16Runs:
    return Bf16Runs(root)


def take_steps(
    root: Path,
    family: str,
    method: str,
    replay: Steps | None = None,
    dtype: str = "bf16",
    **sections: dict[str, Any],
) -> Steps:
    from aropd_mcore.mcore import runtime
    from aropd_mcore.trainer.build import build_run, start_runtime
    from aropd_mcore.trainer.step import train_step

    config = build_config(root, family, dtype, METHODS[method] | sections)
    run = build_run(config, start_runtime(config))
    try:
        if replay is not None and run.engine is not None:
            run = replace(run, source=ReplaySource(run.source, replay.rollouts))
        results = [train_step(run, step) for step in range(NUM_STEPS)]
        teacher = run.teacher.model.named_parameters() if run.teacher else ()
        return Steps(
            [float(result.sums["loss"].sum()) for result in results],
            [list(result.rollouts) for result in results],
            {name: p.cpu() for name, p in teacher},
        )
    finally:
        runtime.stop()


def build_config(
    root: Path, family: str, dtype: str, sections: dict[str, dict[str, Any]]
) -> Config:
    sections["training"] = {"num_steps": NUM_STEPS} | sections.get("training", {})
    tree = tiny_config(root / family, root / "rows.jsonl", root / "out", **sections)
    tree["model"]["dtype"] = dtype
    return Config.model_validate(tree)


def require_fp8(precision: dict[str, Any]) -> None:
    """Skip the test if this machine lacks the format."""
    try:
        check_fp8(PrecisionConfig.model_validate(precision))
    except ConfigError as error:
        pytest.skip(str(error))


def require_transformer_engine() -> None:
    if not torch.cuda.is_available():  # gpu_check.py --dry-run
        pytest.skip("Transformer Engine's layers need a GPU")


def check(actual: Steps, expected: Steps, band: float) -> None:
    assert actual.losses == pytest.approx(expected.losses, rel=band)
    assert expected.losses[0] > 0.01, "the losses are too small to compare"


@BOTH
@pytest.mark.parametrize("family", FAMILIES)
def test_transformer_engine_layers_match_local_layers(root, bf16, family, method, monkeypatch):
    """bf16 with Transformer Engine's layers; fp32 with Megatron's local layers."""
    from aropd_mcore.mcore import layer_specs

    monkeypatch.setattr(layer_specs, "HAVE_TE", False)
    expected = bf16[family, method]
    check(take_steps(root, family, method, expected, "fp32"), expected, BF16_BAND[method])


@BOTH
def test_grouped_experts_match_sequential_experts(root, bf16, method, monkeypatch):
    """One grouped product for all experts and fused permutations, against a product per expert."""
    require_transformer_engine()
    from aropd_mcore.mcore import layer_specs, model_config

    monkeypatch.setattr(layer_specs, "TEColumnParallelGroupedLinear", None)
    monkeypatch.setattr(model_config.moe_utils, "fused_permute", None)
    expected = bf16["qwen3_moe", method]
    actual = take_steps(root, "qwen3_moe", method, expected)
    check(actual, expected, BF16_BAND[method])
    assert actual.losses != expected.losses, "the products were the same"


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_add_their_weight_gradients_in_the_product(root, family):
    """Without a tensor of its own in `grad`, which is rounded to bf16 and added afterwards."""
    require_transformer_engine()
    from aropd_mcore.mcore import runtime
    from aropd_mcore.trainer.build import build_run, start_runtime
    from aropd_mcore.trainer.step import train_step

    config = build_config(root, family, "bf16", METHODS["sft"])
    run = build_run(config, start_runtime(config))
    try:
        train_step(run, 0)
        linear = {n: p for n, p in run.student.model.named_parameters() if ".linear_" in n}
        grouped = [name for name in linear if name.endswith("experts.linear_fc1.weight1")]
        assert bool(grouped) == (family == "qwen3_moe")
        weights: list[Any] = [p for p in linear.values() if p.dim() == 2]
        assert weights and all(p.grad_added_to_main_grad for p in weights)
    finally:
        runtime.stop()


@BOTH
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_training_matches_padded_training(root, bf16, family, method):
    """Flash attention over packed sequences."""
    expected = bf16[family, method]
    actual = take_steps(root, family, method, expected, training=PACKED)
    check(actual, expected, BF16_BAND[method])


@BOTH
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_is_near_bf16(root, bf16, family, method, recipe):
    precision = {"fp8": "hybrid", "fp8_recipe": recipe}
    require_fp8(precision)
    expected = bf16[family, method]
    actual = take_steps(root, family, method, expected, precision=precision, training=PACKED)
    check(actual, expected, FP8_BAND[method])
    assert actual.losses != expected.losses, "FP8 was not used"


def test_fp8_teacher_of_a_bf16_student_is_near_bf16(root, bf16):
    precision = {"teacher_fp8": "e4m3", "bf16_first_layers": 1, "bf16_last_layers": 1}
    require_fp8(precision)
    expected = bf16["qwen2", "aropd"]
    actual = take_steps(root, "qwen2", "aropd", expected, precision=precision)
    check(actual, expected, FP8_BAND["aropd"])
    assert actual.losses != expected.losses, "FP8 was not used"


def test_fp8_rollouts_after_an_update_use_the_new_weights(root):
    """Transformer Engine caches FP8 copies of the weights. After an update, the engine must sample
    as it does with an empty cache."""
    from aropd_mcore.mcore import runtime
    from aropd_mcore.trainer.build import build_run, start_runtime
    from aropd_mcore.trainer.step import train_step

    sections = {"precision": {"fp8": "hybrid"}, "optimizer": {"lr": 1e-2}}
    require_fp8(sections["precision"])
    config = build_config(root, "qwen2", "bf16", sections)
    run = build_run(config, start_runtime(config))
    try:
        prompts, seeds = [(40, 41, 42)] * 4, [1, 2, 3, 4]
        before = sample(run.engine, prompts, seeds, config.rollout)
        train_step(run, 0)
        after = sample(run.engine, prompts, seeds, config.rollout)
        assert [r.logprobs for r in after] != [r.logprobs for r in before]
        for chunk in run.student.model:
            for module in chunk.modules():
                getattr(module, "_fp8_workspaces", {}).clear()
        again = sample(run.engine, prompts, seeds, config.rollout)
        assert [r.logprobs for r in again] == [r.logprobs for r in after]
    finally:
        runtime.stop()


@pytest.mark.parametrize("kind", ["ema", "frozen"])
def test_teacher_on_the_host_equals_the_teacher_on_the_device(root, bf16, kind):
    """The results are bitwise equal, because the arithmetic is the same."""
    replay = bf16["qwen2", "aropd"]
    on_host = {"kind": kind, "weights": "host", "hidden_states": "host"}
    expected = take_steps(root, "qwen2", "aropd", replay, teacher={"kind": kind})
    actual = take_steps(root, "qwen2", "aropd", replay, teacher=on_host)
    assert actual.losses == expected.losses
    assert actual.teacher.keys() == expected.teacher.keys()
    for name, weight in expected.teacher.items():
        assert torch.equal(actual.teacher[name], weight), name


def test_teacher_on_the_host_frees_the_device(root):
    """While the teacher does not score, only its output head is on the device."""
    require_gpu(by_dry_run=True)
    from aropd_mcore.mcore import runtime
    from aropd_mcore.trainer.build import build_run, start_runtime

    config = build_config(root, "qwen2", "bf16", {"teacher": {"weights": "host"}})
    run = build_run(config, start_runtime(config))
    try:
        assert run.teacher is not None
        on_device = [n for n, p in run.teacher.model.named_parameters() if p.is_cuda]
        assert on_device == ["0.output_layer.weight"]
        assert run.teacher.average is not None
        assert all(average.is_pinned() for _, _, average in run.teacher.average.shards())
    finally:
        runtime.stop()
