"""Process groups of a job: one that has gloo, and Megatron's.

gloo connects every rank of a group with every other one as soon as the group exists. Megatron
creates more than 20 groups per rank. If each of them had gloo beside NCCL, a rank of a job of 256
ranks would have more than 1000 sockets. On GPUs, therefore, only the job's own group has gloo, and
all exchanges of objects and CPU tensors use that group.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

_MINUTE = timedelta(minutes=1)

JOB_BACKENDS = {"cuda": "cpu:gloo,cuda:nccl", "cpu": "gloo"}
"""Backends of the job's group, by type of device."""
GROUP_BACKENDS = {"cuda": "nccl", "cpu": "gloo"}
"""Backend of Megatron's groups, by type of device."""


def current_groups() -> dict[str, Any]:
    """Return Megatron's groups, their sizes and its buffers: the globals of parallel_state."""
    return {n: v for n, v in vars(parallel_state).items() if n.startswith("_") and n.isupper()}


NO_GROUPS = current_groups()
"""Globals of parallel_state before groups are created."""


@contextmanager
def using_groups(groups: Mapping[str, Any]) -> Iterator[None]:
    """Context in which Megatron uses these groups, which `current_groups` has returned.

    Many of Megatron's modules and its schedules read parallel_state when they are built or called,
    instead of taking groups as arguments.
    """
    outer = current_groups()
    parallel_state.__dict__.update(groups)
    try:
        yield
    finally:
        parallel_state.__dict__.update(outer)


def create_groups(
    *,
    backend: str,
    tensor: int = 1,
    pipeline: int = 1,
    virtual_pipeline: int = 1,
    context: int = 1,
    expert: int = 1,
    expert_tensor: int = 1,
    timeout: timedelta | None = None,
) -> dist.ProcessGroup:
    """Create Megatron's process groups (megatron.core.parallel_state).

    Args:
        backend: backend of all of Megatron's groups.
        tensor, pipeline, virtual_pipeline, context, expert, expert_tensor: sizes of the layout.
        timeout: timeout of collectives. None: Megatron's default.
    Returns:
        A gloo group of this rank's context ranks, which exchange objects within a model replica.
    Raises:
        ValueError: the sizes do not divide the number of processes, or virtual_pipeline needs more
            than one stage.
    Collectives: creates process groups. Every rank of the job must call it.
    """
    _check_sizes(tensor, pipeline, virtual_pipeline, context, expert, expert_tensor)
    with _all_groups_with(backend):
        parallel_state.initialize_model_parallel(
            tensor,
            pipeline,
            virtual_pipeline_model_parallel_size=virtual_pipeline if virtual_pipeline > 1 else None,
            context_parallel_size=context,
            expert_model_parallel_size=expert,
            expert_tensor_parallel_size=expert_tensor,
            # Megatron makes a timedelta of this number, so fractions are allowed.
            distributed_timeout_minutes=30 if timeout is None else timeout / _MINUTE,  # pyright: ignore[reportArgumentType]
            create_gloo_process_groups=False,
        )
    group: object = parallel_state.get_context_parallel_group()
    assert isinstance(group, dist.ProcessGroup)
    if backend != "gloo" and context > 1:
        group = parallel_state.create_group(  # Megatron's list of its groups then includes it
            dist.get_process_group_ranks(group),
            timeout=timeout,
            backend="gloo",
            use_local_synchronization=True,
            group_desc="CONTEXT_PARALLEL_OBJECTS",
        )
    assert isinstance(group, dist.ProcessGroup)
    return group


def _check_sizes(
    tensor: int,
    pipeline: int,
    virtual_pipeline: int,
    context: int,
    expert: int,
    expert_tensor: int,
) -> None:
    world_size = dist.get_world_size()
    sharing = {"expert": expert, "expert_tensor": expert_tensor}
    replica = math.lcm(tensor * context, expert * expert_tensor) * pipeline
    if world_size % replica:
        named = " x ".join(f"parallel.{n} {size}" for n, size in sharing.items() if size > 1)
        experts = f" with experts sharded over {named} ranks" if named else ""
        raise ValueError(
            f"{world_size} processes cannot be split into model replicas of "
            f"parallel.tensor {tensor} x parallel.pipeline {pipeline} x parallel.context "
            f"{context}{experts}; start a multiple of {replica} processes"
        )
    if virtual_pipeline > 1 and pipeline == 1:
        raise ValueError(
            f"parallel.virtual_pipeline {virtual_pipeline} with parallel.pipeline 1: expected two "
            "stages or more, whose chunks are interleaved; set parallel.virtual_pipeline to 1"
        )


def gather_objects(part: Any) -> list[Any]:
    """Return the parts of all ranks of the job, in rank order.

    Collectives: one all-gather of pickled objects over the job, on the CPU.
    """
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return parts


@contextmanager
def _all_groups_with(backend: str) -> Iterator[None]:
    """Context in which Megatron creates groups with this backend.

    Source: parallel_state.py:214. Without a backend, a group inherits those of the job's group.
    """
    usual = parallel_state.create_group

    def create_group(*args: Any, **kwargs: Any) -> Any:
        return usual(*args, **{**kwargs, "backend": kwargs.get("backend") or backend})

    parallel_state.create_group = create_group
    try:
        yield
    finally:
        parallel_state.create_group = usual
