"""Counts of a sync that `aropd plan` estimates from. tools/benchmarks/sync_counts.py compares them
with real ranks."""

from typing import Any

import pytest

from aropd_mcore.convert.architecture import read_architecture
from aropd_mcore.plan.setup import Setup
from aropd_mcore.plan.sync import sync_cost
from tests.support.tiny_models import tiny_config

LAYOUTS: tuple[tuple[str, dict[str, int]], ...] = (
    ("qwen2", {"tensor": 2, "pipeline": 2, "data": 3}),
    ("qwen3_moe", {"pipeline": 2, "data": 4, "expert": 4}),
)


@pytest.mark.parametrize(("family", "layout"), LAYOUTS)
def test_sync_cost_counts_each_byte_once_and_few_calls(family: str, layout: dict[str, Any]):
    architecture = read_architecture(tiny_config(family).to_dict())
    setup = Setup(architecture, **layout)
    num_bytes = 2 * architecture.num_parameters
    disk, nccl = (sync_cost(setup, path, limit=20_000) for path in ("disk", "nccl"))
    num_tensors = len(architecture.hf_shapes)
    assert disk.num_bytes == nccl.num_bytes == num_bytes
    assert disk.num_owners == setup.world_size and nccl.num_owners == setup.pipeline
    assert num_bytes / setup.world_size <= disk.busiest_bytes < num_bytes / 3
    assert -(-num_bytes // 20_000) / 4 < nccl.broadcasts < num_tensors / 2
    assert nccl.gathers + nccl.sends < num_tensors / 2
