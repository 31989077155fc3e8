"""FP8 without a GPU: refused settings, Megatron's settings and padding.

tests/gpu tests the FP8 products.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aropd_mcore.cli import main
from aropd_mcore.config import PrecisionConfig
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import write_run

PACKED = ["training.packing=true", "training.max_tokens_per_microbatch=400"]
LAYOUTS = [
    ([], 1),
    (["parallel.tensor=2", "parallel.sequence=true"], 2),
    (["parallel.context=2", *PACKED], 2),
    (["parallel.pipeline=2", *PACKED], 2),
]


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("fp8"), objective={"residual_clip": 0.5})


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests machines without a GPU")
def test_fp8_without_a_gpu_is_refused_by_a_run_but_not_by_a_dry_run(path, capfd):
    """A dry run may be made on a login node, for a job on other machines."""
    fp8 = ["precision.fp8=hybrid", "model.dtype=bf16", "views.max_prompt_tokens=96"]
    assert main(["train", str(path), *fp8, "--nproc-per-node", "1"]) == 2
    error = capfd.readouterr().err
    assert "precision.fp8 hybrid needs a GPU, and torch finds none on this machine" in error
    assert main(["train", str(path), *fp8, "--nproc-per-node", "1", "--dry-run"]) == 0


def test_fp8_without_transformer_engine_is_refused(monkeypatch):
    from aropd_mcore.mcore import fp8

    monkeypatch.setattr(fp8, "HAVE_TE", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"fp8 e4m3 needs Transformer Engine.*aropd-mcore\[gpu\]"):
        fp8.check_fp8(PrecisionConfig(teacher_fp8="e4m3"))
    fp8.check_fp8(PrecisionConfig())


def test_model_config_has_the_fp8_settings_of_student_and_teacher():
    """The last layers are in bf16, and the teacher has another format."""
    from aropd_mcore.convert.architecture import read_architecture
    from aropd_mcore.mcore import runtime
    from aropd_mcore.mcore.model_config import model_config
    from tests.conftest import REPO

    architecture = read_architecture(REPO / "examples" / "clusters" / "Qwen2.5-7B-Instruct")
    precision = PrecisionConfig(
        fp8="hybrid", teacher_fp8=None, fp8_recipe="blockwise", bf16_last_layers=2
    )
    here = runtime.start()
    try:
        student, teacher = (
            model_config(architecture, here, dtype=torch.bfloat16, precision=p)
            for p in (precision, precision.for_teacher)
        )
    finally:
        runtime.stop(leave_job=True)
    assert (student.fp8, student.fp8_recipe) == ("hybrid", "blockwise")
    assert student.first_last_layers_bf16
    assert (student.num_layers_at_start_in_bf16, student.num_layers_at_end_in_bf16) == (0, 2)
    assert teacher.fp8 is None


@pytest.mark.parametrize(("overrides", "num_ranks"), LAYOUTS, ids=["one", "SP", "CP", "PP"])
def test_padding_for_fp8_changes_nothing(path, overrides, num_ranks):
    """With padding, every product has a multiple of 16 tokens per rank, in decoding too. Rollouts,
    loss and gradient norm are those without padding."""
    for plain, padded in run_ranks(steps_with_and_without_padding, num_ranks, path, overrides):
        assert plain["responses"] == padded["responses"]
        assert all(size % 16 == 0 for size in padded["sizes"])
        assert any(size % 16 for size in plain["sizes"])
        assert padded["loss"] == pytest.approx(plain["loss"], rel=1e-5)
        assert padded["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-5)


def steps_with_and_without_padding(path: Path, overrides: list[str]) -> list[dict]:
    from aropd_mcore.config_file import load_config
    from aropd_mcore.mcore import runtime
    from aropd_mcore.trainer.build import build_run, start_runtime
    from aropd_mcore.trainer.step import train_step

    config = load_config(path, overrides)
    results = []
    for multiple in (1, 16):
        run = build_run(config, replace(start_runtime(config), token_multiple=multiple))
        sizes: set[int] = set()

        def note_size(_module, _args, kwargs, sizes=sizes) -> None:
            sizes.add(kwargs["hidden_states"].shape[:2].numel())

        for layer in run.student.model.layers:
            layer.register_forward_pre_hook(note_size, with_kwargs=True)
        result = train_step(run, 0)
        results.append(
            {
                "sizes": sizes,
                "responses": [rollout.response_ids for rollout in result.rollouts],
                "loss": float(result.sums["loss"].sum()),
                "grad_norm": result.update.grad_norm,
            }
        )
        runtime.stop()
    return results


def test_decoding_in_fp8_casts_the_weights_again(path):
    """Transformer Engine reuses its FP8 copies of the weights, even after an update, until Megatron
    sets is_first_microbatch. Here plain layers get this attribute."""
    run_ranks(check_flags_while_decoding, 1, path)


def check_flags_while_decoding(path: Path) -> None:
    from aropd_mcore.config_file import load_config
    from aropd_mcore.mcore.decode import decoding
    from aropd_mcore.trainer.build import build_run, start_runtime

    config = load_config(path)
    run = build_run(config, start_runtime(config))
    model = run.student.model
    model.config.fp8 = "hybrid"
    layers = [layer.self_attention.linear_qkv for layer in model.layers]
    for layer in layers:
        layer.is_first_microbatch = False
    with decoding(model, run.runtime, num_rows=1, max_length=4):
        assert all(layer.is_first_microbatch for layer in layers)
