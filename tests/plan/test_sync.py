"""Counts of a sync that `aropd plan` estimates from. tools/benchmarks/sync_counts.py compares them
with real ranks."""

from typing import Any

import pytest

from aropd_mcore.convert.adapter import AdapterSpec
from aropd_mcore.convert.architecture import read_architecture
from aropd_mcore.plan.setup import Setup
from aropd_mcore.plan.sync import sync_cost
from tests.support.tiny_models import tiny_config

LAYOUTS: tuple[tuple[str, dict[str, int]], ...] = (
    ("qwen2", {"tensor": 2, "pipeline": 2, "data": 3}),
    ("qwen3_moe", {"pipeline": 2, "data": 4, "expert": 4}),
)


def test_sync_cost_of_an_adapter_is_that_of_its_bytes():
    architecture = read_architecture(tiny_config("qwen2").to_dict())
    adapter = AdapterSpec(4, 8.0, ("down_proj",))
    cost = sync_cost(Setup(architecture, tensor=2, pipeline=2, data=3, adapter=adapter), "adapter")
    [inputs] = {shape[1] for name, shape in architecture.hf_shapes.items() if "down_proj" in name}
    num_bytes = 2 * 4 * architecture.num_layers * (inputs + architecture.hidden_size)
    assert (cost.num_bytes, cost.busiest_bytes) == (num_bytes, num_bytes)
    assert (cost.num_owners, cost.sends, cost.gathers) == (1, 3, 0)


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
