"""Tests of the sharded moving average: its values and shards, the weights, other layouts."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from aropd_mcore.config_file import load_config
from aropd_mcore.mcore import average, runtime
from aropd_mcore.mcore.checkpoint import state
from aropd_mcore.trainer.build import build_run, start_runtime
from aropd_mcore.trainer.step import train_step
from tests.support.gathered import iter_hf_tensors
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import write_model, write_run

RATE = 0.1
LAYOUTS = [
    ([], ["parallel.tensor=2"]),
    (
        ["parallel.pipeline=2", "model.path={tied}", "parallel.overlap_grad_reduce=true"],
        ["parallel.tensor=2", "model.path={tied}"],
    ),
    (
        [
            "parallel.tensor=2",
            "parallel.sequence=true",
            "parallel.expert=2",
            "model.path={experts}",
        ],
        ["parallel.expert=4", "model.path={experts}"],
    ),
]
"""Settings of a run, and of the run that loads its checkpoint."""


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    path = write_run(tmp_path_factory.mktemp("average"), teacher={"ema_rate": RATE})
    write_model(path.parent / "tied", tie=True)
    write_model(path.parent / "experts", family="qwen3_moe")
    return path


@pytest.mark.parametrize("num_ranks", [1, 4])
def test_average_follows_the_main_weights_in_shards(num_ranks, path, tmp_path):
    run_ranks(check_average, num_ranks, path, tmp_path, timeout=600.0)


def check_average(path: Path, folder: Path) -> None:
    layouts = LAYOUTS if dist.get_world_size() > 1 else [([], [])]
    for number, (first, second) in enumerate(layouts):
        run, average = build(path, first)
        shards = [*average.shards()]
        expected = [
            weight.flatten()[begin : begin + len(values)].float()
            for weight, begin, values in shards
        ]
        mains = main_weights(run)
        for step in range(2):
            assert train_step(run, step).update.applied
            for before, main, (_, _, values) in zip(expected, mains, shards, strict=True):
                before.lerp_(main, RATE)
                assert torch.equal(values, before)
        assert any(not torch.equal(main, main.bfloat16().float()) for main in mains)
        if not first:
            total = sum(p.numel() for p in run.teacher.model.parameters())
            assert sum(map(len, expected)) <= total / dist.get_world_size() + 128
        saved = whole_average(run)
        checkpoint = state.save(folder / str(number), 2, run.student, run.teacher, {}, run.runtime)
        runtime.stop()

        run, _ = build(path, second)
        state.load(checkpoint, run.student, run.teacher, run.runtime)
        loaded = whole_average(run)
        assert loaded.keys() == saved.keys() and bool(saved) == (run.runtime.rank == 0)
        assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())
        runtime.stop()


def build(path: Path, overrides: list[str]) -> tuple[Any, average.ShardedAverage]:
    models = {name: path.parent / name for name in ("tied", "experts")}
    own = [override.format(**models) for override in overrides]
    config = load_config(path, ["model.dtype=bf16", *own])
    # The ranks gather parts of shards, whose size divides nothing.
    with patch.object(average, "GATHERED_ELEMENTS", 4_999):
        run = build_run(config, start_runtime(config))
    assert run.teacher is not None and run.teacher.average is not None
    return run, run.teacher.average


def main_weights(run: Any) -> list[torch.Tensor]:
    """Return this rank's fp32 weights of the optimizer, in the order of its shards."""
    return [
        optimizer._get_main_param_and_optimizer_states(parameter)["param"].detach()
        for optimizer in run.student.optimizer.inner.chained_optimizers
        for ranges in optimizer.gbuf_ranges
        for buckets in ranges.values()
        for bucket in buckets
        for parameter in bucket["param_map"]
    ]


def whole_average(run: Any) -> dict[str, torch.Tensor]:
    """Return the average in fp32 by HF names, on rank 0.

    The teacher's weights must equal it, rounded to bf16.
    """
    rt, values = run.runtime, {}
    for name, weight in run.teacher.model.named_parameters():
        whole = torch.zeros(weight.numel())
        for own, begin, part in run.teacher.average.shards():
            if own is weight:
                whole[begin : begin + len(part)] = part
        has_expert_group = ".experts." in name and rt.shares_experts
        group = rt.expert_dp_group if has_expert_group else rt.dp_cp_group
        dist.all_reduce(whole, group=group)  # each element is on one rank
        assert torch.equal(weight.flatten(), whole.bfloat16()), name
        values[name] = whole.view_as(weight)
    tensors = iter_hf_tensors(run.teacher.model, rt, values)
    return {name: x.clone() for name, x in tensors if x is not None and rt.rank == 0}
