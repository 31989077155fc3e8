"""Tests of the sharded moving average: its values, its shares, and the weights made from it."""

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from aropd_mcore.config_file import load_config
from aropd_mcore.mcore import average, runtime
from aropd_mcore.trainer.build import build_run, start_runtime
from aropd_mcore.trainer.step import train_step
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import write_model, write_run

RATE = 0.1
LAYOUTS = [
    [],
    ["parallel.pipeline=2", "model.path={tied}", "parallel.overlap_grad_reduce=true"],
    ["parallel.tensor=2", "parallel.sequence=true", "parallel.expert=2", "model.path={experts}"],
]


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    path = write_run(tmp_path_factory.mktemp("average"), teacher={"ema_rate": RATE})
    write_model(path.parent / "tied", tie=True)
    write_model(path.parent / "experts", family="qwen3_moe")
    return path


@pytest.mark.parametrize("num_ranks", [1, 4])
def test_average_follows_the_main_weights_in_shards(path, num_ranks):
    run_ranks(check_average, num_ranks, path, timeout=600.0)


def check_average(path: Path) -> None:
    for overrides in LAYOUTS if dist.get_world_size() > 1 else [[]]:
        own = [
            o.format(tied=path.parent / "tied", experts=path.parent / "experts") for o in overrides
        ]
        config = load_config(path, ["model.dtype=bf16", *own])
        # Parts of the shards, which are no multiple of any size.
        with patch.object(average, "GATHERED_ELEMENTS", 4_999):
            run = build_run(config, start_runtime(config))
        assert run.teacher is not None and run.teacher.average is not None
        shards = [*run.teacher.average.shards()]
        expected = [
            weight.flatten()[begin : begin + len(values)].float()
            for weight, begin, values in shards
        ]
        mains = [
            optimizer._get_main_param_and_optimizer_states(parameter)["param"]
            for optimizer in run.student.optimizer.inner.chained_optimizers
            for ranges in optimizer.gbuf_ranges
            for buckets in ranges.values()
            for bucket in buckets
            for parameter in bucket["param_map"]
        ]
        for step in range(2):
            assert train_step(run, step).update.applied
            for before, main, (_, _, values) in zip(expected, mains, shards, strict=True):
                before.lerp_(main.detach(), RATE)
                assert torch.equal(values, before)
        assert any(not torch.equal(main, main.bfloat16().float()) for main in mains)

        numel = 0
        for name, weight in run.teacher.model.named_parameters():
            whole = torch.zeros(weight.numel())
            for own_weight, begin, values in shards:
                if own_weight is weight:
                    whole[begin : begin + len(values)] = values
                    numel += len(values)
            has_experts = ".experts." in name and run.runtime.shares_experts
            group = run.runtime.expert_dp_group if has_experts else run.runtime.dp_cp_group
            dist.all_reduce(whole, group=group)  # each element is on one rank
            assert torch.equal(weight.flatten(), whole.bfloat16()), (overrides, name)
        assert numel == sum(len(values) for _, _, values in shards)
        if not overrides:
            total = sum(p.numel() for p in run.teacher.model.parameters())
            assert numel <= total / dist.get_world_size() + 128
        runtime.stop()
