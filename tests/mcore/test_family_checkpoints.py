"""Checkpoints of every family under tensor and expert parallelism, as the trainer writes them.

The reference is the HF folder. Moments are multiples of the weights, so that a shard in a wrong
place is seen in them too.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from aropd_mcore.config import OptimizerConfig
from aropd_mcore.convert.source import HFSource, MegatronSource
from aropd_mcore.convert.verify import verify
from aropd_mcore.mcore import runtime
from aropd_mcore.mcore.checkpoint import state
from aropd_mcore.mcore.model import StageModel, build_model
from aropd_mcore.mcore.optim import Optimizer
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.mcore.student import Student
from aropd_mcore.mcore.weights import load_hf_weights
from tests.support.ranks import run_ranks
from tests.support.tiny_models import BIASED_EXPERTS, FAMILIES, save_tiny_model

MOMENTS = {"exp_avg": 3.0, "exp_avg_sq": 5.0}
"""Factor of the weights, by the name of the moment."""


@dataclass
class Trained:
    """The parts of a student that checkpoints contain."""

    model: StageModel
    optimizer: Optimizer


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        save_tiny_model(family, root / family, dtype=torch.bfloat16, num_hidden_layers=3)
    return root


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        pytest.param(2, {"tensor": 2, "expert": 2}, marks=pytest.mark.rest),
        pytest.param(2, {"tensor": 2, "expert_tensor": 2}, marks=pytest.mark.matrix),
        pytest.param(4, {"tensor": 2, "expert": 2}, marks=pytest.mark.matrix),
    ],
)
def test_checkpoint_of_every_family_equals_its_folder_and_loads_bitwise(
    root: Path, world_size: int, layout: dict[str, Any], tmp_path: Path
):
    families = [f for f in FAMILIES if "expert_tensor" not in layout or f not in BIASED_EXPERTS]
    run_ranks(save_and_load_all, world_size, root, families, layout, tmp_path, timeout=600.0)
    for family in families:
        (saved,) = (tmp_path / family).glob("iter_*")
        report = verify(HFSource(root / family), MegatronSource(saved, saved, hf=root / family))
        assert report.same and report.tensors, (family, report)


def save_and_load_all(root: Path, families: list[str], layout: dict[str, Any], out: Path) -> None:
    here = runtime.start(**layout, sequence_parallel=True)
    for family in families:
        save_and_load(root / family, here, out / family)


def save_and_load(folder: Path, here: Runtime, out: Path) -> None:
    """Save a model with its optimizer, overwrite both, and compare what is loaded."""
    model = build_model(folder, here, dtype=torch.bfloat16)
    load_hf_weights(model, folder, here)
    trained = Trained(model, Optimizer(model, OptimizerConfig(), num_steps=1))
    check_saves(trained, folder, here, out)


@torch.no_grad()
def check_saves(trained: Trained, folder: Path, here: Runtime, out: Path) -> None:
    model = trained.model
    for _, weight, moments in optimizer_shards(trained):
        for name, factor in MOMENTS.items():
            moments[name].copy_(factor * weight)
    values = {name: tensor.clone() for name, tensor in tensors(model).items()}
    weights = {name: weight.clone() for name, weight, _ in optimizer_shards(trained)}
    saved = state.save(out, 1, cast(Student, trained), None, {}, here)
    for tensor in tensors(model).values():
        tensor.fill_(-1.0)
    for _, weight, moments in optimizer_shards(trained):
        for shard in (weight, *(moments[name] for name in MOMENTS)):
            shard.fill_(-1.0)
    state.load(saved, cast(Student, trained), None, here)
    for name, tensor in tensors(model).items():
        assert torch.equal(tensor, values[name]), (folder.name, name)
    for name, weight, moments in optimizer_shards(trained):
        assert torch.equal(weight, weights[name]), (folder.name, name)
        for moment, factor in MOMENTS.items():
            assert torch.equal(moments[moment], factor * weights[name]), (folder.name, name, moment)


def tensors(model: StageModel) -> dict[str, Tensor]:
    """Return the parameters and buffers that checkpoints contain."""
    names = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: names[name] for name in model.state_dict() if name in names}


def optimizer_shards(trained: Trained) -> list[tuple[str, Tensor, dict[str, Tensor]]]:
    """Return name, fp32 weights and moments of each parameter of which this rank has a shard."""
    names = {p: name for name, p in trained.model.named_parameters()}
    return [
        (names[p], states["param"], states)
        for part in trained.optimizer.inner.chained_optimizers
        for p in cast(Any, part).model_param_gbuf_map
        for states in [cast(Any, part)._get_main_param_and_optimizer_states(p)]
    ]
