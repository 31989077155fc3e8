"""Device, process groups and seeds of this process."""

import logging
import warnings

from aropd_mcore.environment import prepare_process
from aropd_mcore.mcore.patches import cpu_mode

# Warnings that Megatron causes on every rank: packages that are not installed, renamed torch APIs.
for message in (
    ".*Apex (are|is) not installed",
    "full scope is deprecated",
    ".torch.distributed.* is deprecated",
    ".load_state_dict. is deprecated",
    "Please use DTensor instead",
    ".sequence_parallel. is set to .True., but tensor",  # for experts that tensor does not shard
):
    warnings.filterwarnings("ignore", message=message)
logging.getLogger("megatron.core").setLevel(logging.ERROR)  # deprecations, on every rank

prepare_process()
cpu_mode.install()  # before the first import of megatron.core

import math  # noqa: E402
import os  # noqa: E402
from collections.abc import Mapping  # noqa: E402
from contextlib import AbstractContextManager, suppress  # noqa: E402
from dataclasses import dataclass, field  # noqa: E402
from datetime import timedelta  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state, tensor_parallel  # noqa: E402

from aropd_mcore.mcore.groups import (  # noqa: E402
    GROUP_BACKENDS,
    JOB_BACKENDS,
    NO_GROUPS,
    create_groups,
    current_groups,
    gather_objects,
    using_groups,
)
from aropd_mcore.mcore.rendezvous import reporting_long_wait  # noqa: E402
from aropd_mcore.stages import Stages  # noqa: E402


@dataclass(frozen=True)
class Runtime:
    """This process's device and process groups.

    - tp_group (tensor) and pp_group (pipeline stages): ranks over which the model is sharded.
    - cp_group (context): ranks with the same shard that split the positions of the same sequences.
    - cp_objects_group: the ranks of cp_group, for pickled objects.
    - dp_group (data): ranks with the same shard and different sequences.
    - dp_cp_group: all ranks with the same shard.
    - tp_cp_group: ranks that hold the tokens of the same sequences.
    - etp_group (expert tensor): consecutive ranks over which each expert's matrices are sharded.
    - ep_group (expert): ranks with the same part of the matrices, over which a layer's experts are
      distributed.
    - expert_dp_group: all ranks of a stage with the same experts.

    etp_group and ep_group cover the tensor ranks of a stage first, then its replicas.

    On a GPU the groups use NCCL, and cp_objects_group gloo. The job's own group has both.
    """

    device: torch.device
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    cp_objects_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    dp_cp_group: dist.ProcessGroup
    tp_cp_group: dist.ProcessGroup
    ep_group: dist.ProcessGroup
    etp_group: dist.ProcessGroup
    expert_dp_group: dist.ProcessGroup
    stages: Stages
    """Split of the layers into pipeline stages."""
    sequence_parallel: bool
    """Whether each tensor rank holds a part of the tokens between the layers' matrix products."""
    megatron_groups: Mapping[str, Any] = field(repr=False, compare=False)
    """These groups and others, as Megatron's globals (groups.current_groups)."""
    token_multiple: int = 1
    """Required divisor of a rank's number of tokens. More than 1 for FP8 matrix products."""

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        return dist.get_world_size()

    @property
    def local_rank(self) -> int:
        """Number of this process among those of its machine."""
        return int(os.environ.get("LOCAL_RANK", "0"))

    @property
    def tp_size(self) -> int:
        return self.tp_group.size()

    @property
    def tp_rank(self) -> int:
        return self.tp_group.rank()

    @property
    def pp_size(self) -> int:
        return self.pp_group.size()

    @property
    def pp_rank(self) -> int:
        return self.pp_group.rank()

    @property
    def vp_size(self) -> int:
        """Number of model chunks per pipeline stage. More than one if interleaved."""
        return self.stages.virtual_pipeline

    @property
    def cp_size(self) -> int:
        return self.cp_group.size()

    @property
    def cp_rank(self) -> int:
        return self.cp_group.rank()

    @property
    def dp_size(self) -> int:
        return self.dp_group.size()

    @property
    def dp_rank(self) -> int:
        return self.dp_group.rank()

    @property
    def ep_size(self) -> int:
        return self.ep_group.size()

    @property
    def ep_rank(self) -> int:
        return self.ep_group.rank()

    @property
    def etp_size(self) -> int:
        return self.etp_group.size()

    @property
    def etp_rank(self) -> int:
        return self.etp_group.rank()

    @property
    def shares_experts(self) -> bool:
        """Whether a layer's experts, or the matrices of each, are sharded over several ranks."""
        return self.ep_size * self.etp_size > 1

    @property
    def sequence_size(self) -> int:
        """Number of tensor ranks that split the tokens between matrix products."""
        return self.tp_size if self.sequence_parallel else 1

    @property
    def segment_multiple(self) -> int:
        """Required divisor of a packed sample's length (data.context_parallel)."""
        return 2 * self.cp_size if self.cp_size > 1 else 1

    @property
    def length_multiple(self) -> int:
        """Required divisor of the length of a sequence in the model."""
        per_rank = math.lcm(self.token_multiple, 2 if self.cp_size > 1 else 1)
        return per_rank * self.cp_size * self.sequence_size

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def samples(self) -> bool:
        """Whether this rank samples the tokens of its model replica."""
        return self.is_last_stage and self.tp_rank == 0

    @property
    def last_stage_rank(self) -> int:
        """Global rank of this replica's last pipeline stage, with the same tensor rank."""
        return dist.get_global_rank(self.pp_group, self.pp_size - 1)

    def active(self) -> AbstractContextManager[None]:
        """Return a context in which Megatron's modules and schedules use these groups.

        A job with several layouts (`add_layout`) needs it to build and to run a model. Outside of
        such contexts Megatron uses the groups of `start`.
        """
        return using_groups(self.megatron_groups)

    def gather_over_data(self, local: torch.Tensor) -> torch.Tensor:
        """Concatenate the CPU tensors of dp_group's ranks, in rank order.

        Args:
            local: this rank's tensor, of the same shape and dtype on every rank.
        Returns:
            CPU tensor. Its first dimension is dp_size times that of `local`.
        Collectives: one all-gather over dp_group.
        """
        local = local.to(self.device)
        parts = [torch.empty_like(local) for _ in range(self.dp_size)]
        dist.all_gather(parts, local, group=self.dp_group)
        return torch.cat(parts).cpu()

    def concatenate_over_data(self, local: list[Any]) -> list[Any]:
        """Concatenate the lists of dp_group's ranks, in rank order. Lengths may differ.

        Args:
            local: the same on all ranks of a model replica. Each of them sends a part of it.
        Collectives: one all-gather of pickled objects over the job, on the CPU.
        """
        if self.dp_size == 1:
            return local
        num_parts = self.world_size // self.dp_size
        index = (self.pp_rank * self.cp_size + self.cp_rank) * self.tp_size + self.tp_rank
        start, end = (len(local) * i // num_parts for i in (index, index + 1))
        parts = self.gather((self.dp_rank, index, local[start:end]))
        return [item for *_, part in sorted(parts, key=lambda part: part[:2]) for item in part]

    def gather(self, part: Any) -> list[Any]:
        """Return the parts of all ranks of the job, in rank order (data.ranks.Ranks).

        Collectives: one all-gather of pickled objects over the job, on the CPU.
        """
        return gather_objects(part)

    def max_over_job(self, value: int) -> int:
        """Return the maximum of all ranks' values.

        Collectives: one all-reduce over the whole job, on the CPU.
        """
        largest = torch.tensor(value)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def numbers_of_rank0(self, *numbers: float) -> list[float]:
        """Return rank 0's numbers, as 64-bit floats.

        Sums over different groups may differ in their last digit, so ranks that compare such sums
        with a threshold must compare rank 0's.

        Collectives: one broadcast over the whole job, on the CPU.
        """
        values = torch.tensor(numbers, dtype=torch.float64)
        dist.broadcast(values, src=0)
        return values.tolist()

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a config's `bf16`, `fp32` or `auto`: bf16 on a GPU, else fp32."""
        if name == "auto":
            name = "bf16" if self.device.type == "cuda" else "fp32"
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


def start(
    *,
    tensor: int = 1,
    pipeline: int = 1,
    virtual_pipeline: int = 1,
    layers_in_first_stage: int | None = None,
    layers_in_last_stage: int | None = None,
    pipeline_layout: str | None = None,
    context: int = 1,
    expert: int = 1,
    expert_tensor: int = 1,
    sequence_parallel: bool = False,
    token_multiple: int = 1,
    seed: int = 1234,
    timeout: timedelta | None = None,
) -> Runtime:
    """Join the job, create its process groups and seed all random generators.

    RANK, WORLD_SIZE and LOCAL_RANK describe the job, as torchrun sets them. Without RANK, the job
    consists of this process only. On GPUs, Megatron's groups use NCCL, and the job's group also has
    gloo, for objects and CPU tensors.

    Args:
        tensor, pipeline, context: number of ranks over which weights, layers and sequences are
            sharded. Data parallelism takes the remaining factor.
        virtual_pipeline: number of chunks per stage, interleaved over the layers.
        layers_in_first_stage, layers_in_last_stage, pipeline_layout: split of the layers into
            stages, as in config.ParallelConfig. None: an even split.
        expert: number of ranks of a stage over which its experts are distributed.
        expert_tensor: number of ranks of a stage over which each expert's matrices are sharded.
        sequence_parallel: split the tokens over the tensor ranks where weights are not split.
        token_multiple: see Runtime.
        seed: the same on every rank.
        timeout: timeout of collectives. None: the defaults of torch and Megatron.
    Raises:
        ValueError: the sizes do not divide the number of processes, virtual_pipeline needs more
            than one stage, sequence_parallel needs more than one tensor rank, or the settings of
            the layers' split contradict each other.
    Collectives: creates process groups. Every rank of the job must call it. If that takes long, the
        first rank of each machine prints gloo's address and what to check.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    with reporting_long_wait():
        if not dist.is_initialized():
            _join_job(JOB_BACKENDS[device.type], timeout)
        stages = Stages(
            pipeline, virtual_pipeline, layers_in_first_stage, layers_in_last_stage, pipeline_layout
        )
        runtime = _create_runtime(
            device,
            stages,
            tensor=tensor,
            context=context,
            expert=expert,
            expert_tensor=expert_tensor,
            sequence_parallel=sequence_parallel,
            token_multiple=token_multiple,
            timeout=timeout,
        )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    torch.manual_seed(seed)
    return runtime


def add_layout(
    runtime: Runtime,
    stages: Stages,
    *,
    tensor: int,
    expert: int,
    expert_tensor: int,
    sequence_parallel: bool,
    timeout: timedelta | None = None,
) -> Runtime:
    """Create the process groups of another layout of the job's ranks, for a second model.

    The second model reads whole sequences: its context size is 1.

    Args:
        runtime: result of `start`.
        stages: split of the second model's layers.
        tensor, expert, expert_tensor, sequence_parallel, timeout: see `start`.
    Raises:
        ValueError: see `start`.
    Collectives: creates process groups. Every rank of the job must call it.
    """
    with using_groups(NO_GROUPS), reporting_long_wait():
        return _create_runtime(
            runtime.device,
            stages,
            tensor=tensor,
            context=1,
            expert=expert,
            expert_tensor=expert_tensor,
            sequence_parallel=sequence_parallel,
            token_multiple=runtime.token_multiple,
            timeout=timeout,
        )


def _create_runtime(
    device: torch.device,
    stages: Stages,
    *,
    sequence_parallel: bool,
    token_multiple: int,
    tensor: int,
    **sizes: Any,
) -> Runtime:
    """
    Args:
        sizes: further arguments of create_groups.
    """
    if sequence_parallel and tensor == 1:
        raise ValueError(
            "parallel.sequence true with parallel.tensor 1: expected two tensor ranks or more, "
            "over which tokens are split; set parallel.sequence to false"
        )
    cp_objects_group = create_groups(
        backend=GROUP_BACKENDS[device.type],
        tensor=tensor,
        pipeline=stages.pipeline,
        virtual_pipeline=stages.virtual_pipeline,
        **sizes,
    )
    return Runtime(
        device=device,
        tp_group=_checked(parallel_state.get_tensor_model_parallel_group()),
        pp_group=_checked(parallel_state.get_pipeline_model_parallel_group()),
        cp_group=_checked(parallel_state.get_context_parallel_group()),
        cp_objects_group=cp_objects_group,
        dp_group=_checked(parallel_state.get_data_parallel_group()),
        dp_cp_group=_checked(parallel_state.get_data_parallel_group(with_context_parallel=True)),
        tp_cp_group=_checked(parallel_state.get_tensor_and_context_parallel_group()),
        ep_group=_checked(parallel_state.get_expert_model_parallel_group()),
        etp_group=_checked(parallel_state.get_expert_tensor_parallel_group()),
        expert_dp_group=_checked(parallel_state.get_expert_data_parallel_group()),
        stages=stages,
        sequence_parallel=sequence_parallel,
        megatron_groups=current_groups(),
        token_multiple=token_multiple,
    )


def _join_job(backend: str, timeout: timedelta | None) -> None:
    """Create the job's own group. Without RANK, it consists of this process only."""
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
        return
    dist.init_process_group(
        backend,
        store=dist.HashStore(),  # pyright: ignore[reportPrivateImportUsage]
        rank=0,
        world_size=1,
        timeout=timeout,
    )


def _checked(group: object) -> dist.ProcessGroup:
    """Return parallel_state's group. Other types, for ranks outside of a group, do not occur."""
    assert isinstance(group, dist.ProcessGroup)
    return group


def stop(*, leave_job: bool = False) -> None:
    """Destroy the groups of `start`, so that it can be called again with another layout.

    Args:
        leave_job: also leave torch.distributed. A process does this once, before it exits.
    """
    # destroy_model_parallel destroys some groups and drops the others, whose threads keep running.
    groups = parallel_state._global_process_group_list or []
    parallel_state.destroy_model_parallel()
    for group in groups:
        if group is not None:  # None is the job's own
            with suppress(ValueError):  # already destroyed
                dist.destroy_process_group(group)
    if leave_job:
        dist.destroy_process_group()
