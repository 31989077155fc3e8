"""Experts in grouped linear layers: names, conversion and checkpoints.

The layers are a stand-in for Transformer Engine's. tests/gpu/test_training.py tests the real ones.
"""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from aropd_mcore.config_file import load_config
from aropd_mcore.mcore import runtime
from aropd_mcore.mcore.checkpoint import state
from aropd_mcore.trainer.build import build_run, start_runtime
from aropd_mcore.trainer.step import Run, train_step
from tests.support.gathered import iter_hf_tensors
from tests.support.grouped_linear import GroupedLinear, grouped_experts
from tests.support.ranks import run_ranks
from tests.support.tiny_adapters import write_adapter
from tests.support.tiny_runs import write_model, write_run

LAYOUTS = {
    "saved": ["parallel.tensor=2", "parallel.sequence=true", "parallel.expert=2"],
    "divided": ["parallel.expert=2"],
    "loaded": ["parallel.expert=2", "parallel.expert_tensor=2"],
}


def test_grouped_experts_equal_sequential_ones_and_share_their_checkpoints(tmp_path):
    path = write_run(tmp_path)
    write_model(tmp_path / "model", family="qwen3_moe")
    run_ranks(check, 4, path, tmp_path, timeout=600.0)


def check(path: Path, folder: Path) -> None:
    saved, checkpoints, losses = {}, {}, {}
    for grouped in (False, True):
        run = build(path, "saved", grouped)
        losses[grouped] = float(train_step(run, 0).sums["loss"].sum())
        saved[grouped] = hf_tensors(run)
        parts = run.student, run.teacher, {}, run.runtime
        checkpoints[grouped] = state.save(folder / str(grouped), 1, *parts)
        runtime.stop()
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
    for name, tensor in saved[False].items():
        assert_close(saved[True][name], tensor, rtol=1e-4, atol=1e-6)

    for grouped in (False, True):
        run = build(path, "loaded", grouped)
        state.load(checkpoints[not grouped], run.student, run.teacher, run.runtime)
        for name, tensor in hf_tensors(run).items():
            assert torch.equal(tensor, saved[not grouped][name]), name
        moments = run.student.optimizer.inner.chained_optimizers[-1].optimizer.state.values()
        assert any(moment["exp_avg"].any() for moment in moments), "no optimizer state was loaded"
        runtime.stop()


@pytest.mark.rest
def test_adapter_of_grouped_experts_equals_that_of_sequential_ones(tmp_path):
    path = write_run(tmp_path)
    write_model(tmp_path / "model", family="qwen3_moe")
    targets = ["k_proj", "up_proj", "down_proj"]
    adapter = write_adapter(tmp_path / "adapter", tmp_path / "model", targets=targets)
    settings = {"rank": 4, "alpha": 8, "targets": targets, "path": str(adapter)}
    run_ranks(check_adapter, 2, path, f"adapter={json.dumps(settings)}", timeout=600.0)


def check_adapter(path: Path, adapter: str) -> None:
    norms, tensors = [], []
    for grouped in (False, True):
        run = build(path, "divided", grouped, adapter)
        norms.append(train_step(run, 0).update.grad_norm)
        adapters = run.student.model.adapters
        assert adapters is not None
        tensors.append({name: p.detach().clone() for name, p in adapters.trained.items()})
        runtime.stop()
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    assert any(".experts." in name for name in tensors[0])
    for name, tensor in tensors[0].items():
        assert_close(tensors[1][name], tensor, rtol=1e-4, atol=1e-6)


def build(path: Path, layout: str, grouped: bool, *overrides: str) -> Run:
    config = load_config(path, [*LAYOUTS[layout], *overrides])
    with grouped_experts() if grouped else nullcontext():
        run = build_run(config, start_runtime(config))
    names = [name for name, _ in run.student.model.named_parameters()]
    assert any(name.endswith("mlp.experts.linear_fc1.weight1") for name in names) == grouped
    layers = [m for m in run.student.model.modules() if isinstance(m, GroupedLinear)]
    # A frozen layer has no gradient to accumulate.
    assert all(layer.fuse_wgrad_accumulation == (not overrides) for layer in layers)
    return run


def hf_tensors(run: Run) -> dict[str, Any]:
    """Return the weights of student and teacher by HF names, on rank 0."""
    assert run.teacher is not None
    return {
        f"{role}.{name}": tensor.clone()
        for role, model in (("student", run.student.model), ("teacher", run.teacher.model))
        for name, tensor in iter_hf_tensors(model, run.runtime)
        if tensor is not None and run.runtime.rank == 0
    }
