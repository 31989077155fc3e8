"""Tests of the division of a checkpoint over ranks: equal shares, no copies, exact reads."""

import io
import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from aropd_mcore.config_file import load_config
from aropd_mcore.convert import torch_dist
from aropd_mcore.convert.tensor_bytes import read_into
from aropd_mcore.mcore import runtime
from aropd_mcore.mcore.average import ShardedAverage
from aropd_mcore.mcore.checkpoint import shards, state
from aropd_mcore.mcore.checkpoint.shards import Box, split_range
from aropd_mcore.mcore.checkpoint.writer import Writing
from aropd_mcore.trainer.build import build_run, start_runtime
from aropd_mcore.trainer.step import Run, train_step
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import write_model, write_run


@st.composite
def shapes_and_ranges(draw):
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    numel = math.prod(shape)
    start = draw(st.integers(0, numel - 1))
    return shape, start, draw(st.integers(start + 1, numel))


@given(shapes_and_ranges())
def test_split_range_yields_its_elements_in_order_in_few_contiguous_boxes(drawn):
    shape, start, stop = drawn
    numbers = torch.arange(math.prod(shape)).view(shape)
    boxes = list(split_range(shape, start, stop))
    parts = [
        numbers[tuple(slice(o, o + s) for o, s in zip(offset, sizes, strict=True))]
        for offset, sizes in boxes
    ]
    assert all(part.is_contiguous() for part in parts)
    assert torch.cat([part.flatten() for part in parts]).tolist() == list(range(start, stop))
    assert len(boxes) <= max(2 * len(shape) - 1, 1)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    path = write_run(tmp_path_factory.mktemp("shards"))
    write_model(path.parent / "experts", family="qwen3_moe")
    return path


def build(path: Path, *overrides: str) -> Run:
    config = load_config(path, ["model.dtype=bf16", *overrides])
    return build_run(config, start_runtime(config))


def boxes_of(run: Run) -> list[Box]:
    return state._contents(run.student, run.teacher, run.runtime)[2]


LAYOUTS = [
    [],
    ["parallel.tensor=2", "parallel.sequence=true", "parallel.expert=2", "model.path={experts}"],
]


def test_ranks_write_and_read_equal_parts_without_copies(path, tmp_path):
    run_ranks(check_shares, 4, path, tmp_path, timeout=600.0)


def check_shares(path: Path, folder: Path) -> None:
    for number, layout in enumerate(LAYOUTS):
        overrides = [o.format(experts=path.parent / "experts") for o in layout]
        run = build(path, *overrides)
        for tensor in optimizer_tensors(run):
            tensor.detach().normal_()
        own = {tensor.untyped_storage().data_ptr() for tensor in state_tensors(run)}
        boxes = boxes_of(run)
        assert {box.values.untyped_storage().data_ptr() for box in boxes} <= own
        by_rank = gather(sum(box.values.nbytes for box in boxes), run.runtime.dp_cp_group)
        assert max(by_rank) <= 1.02 * sum(by_rank) / len(by_rank), (layout, by_rank)
        # Of what every tensor rank holds whole, such as norms, only the first one writes its part.
        is_written = [not any(box.replica_id) for box in boxes]
        assert all(is_written) == (run.runtime.tp_rank == 0), layout
        parts = run.student, run.teacher
        saved = state.save(folder / str(number), 1, *parts, {}, run.runtime)
        values = [tensor.detach().clone() for tensor in state_tensors(run)]
        runtime.stop()

        run = build(path, *overrides)
        with patch.object(torch_dist, "read_into", CountingRead()) as read:
            state.load(saved, run.student, run.teacher, run.runtime)
        # Tensor ranks read norms and routers more than once.
        total = sum(info.num_bytes for info in torch_dist.TorchDistReader(saved).tensors.values())
        assert total <= sum(gather(read.num_bytes)) <= 1.05 * total, layout
        for loaded, value in zip(state_tensors(run), values, strict=True):
            assert torch.equal(loaded, value)
        runtime.stop()


def state_tensors(run: Run) -> list[Tensor]:
    """Return this rank's tensors of the student, the teacher and the optimizer."""
    assert run.teacher is not None
    assert run.teacher.average is not None
    models = [*run.student.model.parameters(), *run.teacher.model.parameters()]
    averages = [average for _, _, average in run.teacher.average.shards()]
    return [*models, *averages, *optimizer_tensors(run)]


def optimizer_tensors(run: Run) -> list[Tensor]:
    return [
        tensor
        for part in run.student.optimizer.inner.chained_optimizers
        for group in part.optimizer.param_groups
        for p in group["params"]
        for tensor in (p, *part.optimizer.state[p].values())
    ]


def gather(number: int, group: dist.ProcessGroup | None = None) -> list[int]:
    numbers = [0] * dist.get_world_size(group)
    dist.all_gather_object(numbers, number, group=group)
    return numbers


class CountingRead:
    """Replacement of read_into that counts bytes."""

    num_bytes = 0

    def __call__(self, file: io.FileIO, tensor: Tensor) -> None:
        self.num_bytes += tensor.nbytes
        read_into(file, tensor)


def test_checkpoint_of_whole_tensors_loads(path, tmp_path):
    """Megatron's `fully_reshardable`, the form that versions before 0.2 wrote."""
    run_ranks(check_earlier_form, 4, path, tmp_path)


def check_earlier_form(path: Path, folder: Path) -> None:
    experts = ["parallel.expert=2", f"model.path={path.parent / 'experts'}"]
    run = build(path, *experts)
    assert run.teacher is not None and run.teacher.average is not None
    train_step(run, 0)
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "dp_cp_group": run.runtime.dp_cp_group,
    }
    model = {"model": run.student.model.sharded_state_dict(metadata=metadata)}
    parts = run.student.optimizer.inner.chained_optimizers
    tensors = [part.sharded_state_dict(model, metadata=metadata)["param_state"] for part in parts]
    whole = model | {
        "optimizer": {str(i): part for i, part in enumerate(tensors)},
        "teacher": with_average(run.teacher.sharded_state_dict(metadata), run.teacher.average),
        "progress": {"step": 1},
        "layout": state._layout(run.runtime),
        "rng": state._rng_state(run.runtime),
        **run.student.optimizer.state_dict(),
    }
    written, errors = Writing(whole, folder).finish()
    assert not written.error and not errors
    values = [tensor.detach().clone() for tensor in state_tensors(run)]
    updates = run.student.optimizer.state_dict()
    runtime.stop()

    run = build(path, *experts)
    assert state.load(folder, run.student, run.teacher, run.runtime) == {"step": 1}
    for loaded, value in zip(state_tensors(run), values, strict=True):
        assert torch.equal(loaded, value)
    assert run.student.optimizer.state_dict() == updates and updates["num_updates"] == 1


def with_average(teacher: dict[str, Any], average: ShardedAverage) -> dict[str, Any]:
    """Change the average, and return the teacher's state with it: whole on every rank, in fp32."""
    for weight, begin, values in average.shards():
        values.copy_(1.01 * weight.flatten()[begin : begin + len(values)].float())
    for entry in shards._entries(teacher):
        entry.data = 1.01 * entry.data.detach().float()
        if isinstance(entry, ShardedTensor):
            entry.dtype = torch.float32
    average.write_weights()
    return teacher


def test_number_of_updates_ignores_groups_without_tensors(path):
    run_ranks(check_number_of_updates, 1, path)


def check_number_of_updates(path: Path) -> None:
    optimizer = build(path, "objective.name=sft").student.optimizer
    optimizer.zero_grad()
    optimizer.step(optimizer.grad_norm(), apply=True)
    groups = optimizer.inner.chained_optimizers[0].optimizer.param_groups
    groups.insert(0, groups[0] | {"params": [], "step": 0})  # as Transformer Engine leaves it
    assert optimizer.state_dict()["num_updates"] == 1
