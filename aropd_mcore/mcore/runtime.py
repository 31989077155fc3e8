"""Device, process groups and seeds of this process."""

import logging
import warnings

from aropd_mcore.mcore.patches import cpu_mode

# Said on every rank, of Megatron's own code: what is not installed, and what torch has renamed.
for message in (
    ".*Apex (are|is) not installed",
    ".*CUDA_DEVICE_MAX_CONNECTIONS",
    "full scope is deprecated",
    ".torch.distributed.* is deprecated",
    ".load_state_dict. is deprecated",
    "Please use DTensor instead",
    ".sequence_parallel. is set to .True., but tensor",  # of experts, whole on every tensor rank
):
    warnings.filterwarnings("ignore", message=message)
logging.getLogger("megatron.core").setLevel(logging.ERROR)  # its deprecations, on every rank

cpu_mode.install()  # before the first import of megatron.core

import math  # noqa: E402
import os  # noqa: E402
from contextlib import suppress  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from datetime import timedelta  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state, tensor_parallel  # noqa: E402

_MINUTE = timedelta(minutes=1)


@dataclass(frozen=True)
class Runtime:
    """Where this process stands: its device and its process groups.

    The model is sharded over tp_group (tensor) and pp_group (pipeline stages). Ranks with the same
    shard are joined by cp_group (context) where they share out the positions of the same sequences,
    by dp_group where each has sequences of its own, and all of them by dp_cp_group; tp_cp_group has
    the tokens of the same sequences. The experts of a layer are the exception, shared out across
    tensor ranks of a stage first and then across its replicas: etp_group, ranks in a row, cuts each
    expert's matrices, and ep_group, ranks with the same part of them, shares experts out.
    """

    device: torch.device
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    dp_cp_group: dist.ProcessGroup
    tp_cp_group: dist.ProcessGroup
    ep_group: dist.ProcessGroup
    etp_group: dist.ProcessGroup
    vp_size: int
    """Model chunks on each pipeline stage; more than one in the interleaved layout."""
    sequence_parallel: bool
    """Whether, between the layers' matrix products, each tensor rank holds a part of the tokens."""
    token_multiple: int = 1
    """What a rank's number of tokens must be a multiple of; more than 1 for products in fp8."""

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        return dist.get_world_size()

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
        """Whether a rank has but a part of its layers' experts, or of each of them."""
        return self.ep_size * self.etp_size > 1

    @property
    def sequence_size(self) -> int:
        """Tensor ranks that share out the tokens between matrix products."""
        return self.tp_size if self.sequence_parallel else 1

    @property
    def segment_multiple(self) -> int:
        """What a packed sample's length must be a multiple of (data.context_parallel)."""
        return 2 * self.cp_size if self.cp_size > 1 else 1

    @property
    def length_multiple(self) -> int:
        """What the length of a sequence in the model must be a multiple of."""
        a_rank = math.lcm(self.token_multiple, 2 if self.cp_size > 1 else 1)
        return a_rank * self.cp_size * self.sequence_size

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def samples(self) -> bool:
        """Whether this rank draws the tokens of its model replica."""
        return self.is_last_stage and self.tp_rank == 0

    @property
    def last_stage_rank(self) -> int:
        """Global rank of the last pipeline stage of this model replica, same tensor rank."""
        return dist.get_global_rank(self.pp_group, self.pp_size - 1)

    def gather_over_data(self, local: torch.Tensor) -> torch.Tensor:
        """Concatenate a CPU tensor of equal shape on every rank over dp_group, in rank order.

        Collectives: one all-gather over dp_group.
        """
        mine = local.to(self.device)
        parts = [torch.empty_like(mine) for _ in range(self.dp_size)]
        dist.all_gather(parts, mine, group=self.dp_group)
        return torch.cat(parts).cpu()

    def concatenate_over_data(self, local: list[Any]) -> list[Any]:
        """The lists of all ranks of dp_group, of any lengths, one after another in rank order.

        Collectives: one all-gather of pickled objects over dp_group.
        """
        if self.dp_size == 1:
            return local
        parts: list[list[Any]] = [[] for _ in range(self.dp_size)]
        dist.all_gather_object(parts, local, group=self.dp_group)
        return [item for part in parts for item in part]

    def max_over_job(self, value: int) -> int:
        """The largest of all ranks' values.

        Collectives: one all-reduce over the whole job, on the CPU.
        """
        largest = torch.tensor(value)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that a config's `bf16`, `fp32` or `auto` means here."""
        if name == "auto":
            name = "bf16" if self.device.type == "cuda" else "fp32"
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


def start(
    *,
    tensor: int = 1,
    pipeline: int = 1,
    virtual_pipeline: int = 1,
    context: int = 1,
    expert: int = 1,
    expert_tensor: int = 1,
    sequence_parallel: bool = False,
    token_multiple: int = 1,
    seed: int = 1234,
    timeout: timedelta | None = None,
) -> Runtime:
    """Join the job's processes, split them into groups and seed every generator.

    Under torchrun the job is what RANK, WORLD_SIZE and LOCAL_RANK say; otherwise it is this
    process alone. NCCL serves tensors on the GPU, gloo those on the CPU.

    Args:
        tensor, pipeline, context: sizes of the model's and the sequences' sharding; data
            parallelism takes the rest.
        virtual_pipeline: chunks that each stage holds, interleaved over the layers.
        expert: ranks of a stage that share out its experts.
        expert_tensor: ranks of a stage that share out the matrices of each expert.
        sequence_parallel: split the tokens over the tensor ranks where weights are not split.
        token_multiple: see Runtime.
        seed: the same on every rank.
        timeout: of collectives; torch's and Megatron's defaults if None.
    Raises:
        ValueError: the sizes do not divide the number of processes, virtual_pipeline has no stages
            to interleave, or sequence_parallel no tensor ranks to split over.
    Collectives: creates process groups; every rank of the job must call it.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        # Tensor parallelism overlaps communication only when kernels queue in order.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(
                backend,
                store=dist.HashStore(),  # pyright: ignore[reportPrivateImportUsage]
                rank=0,
                world_size=1,
                timeout=timeout,
            )
    _check_sizes(
        dist.get_world_size(),
        tensor,
        pipeline,
        virtual_pipeline,
        context,
        expert,
        expert_tensor,
    )
    if sequence_parallel and tensor == 1:
        raise ValueError("sequence parallelism splits tokens over tensor ranks; tensor is 1")
    parallel_state.initialize_model_parallel(
        tensor,
        pipeline,
        virtual_pipeline_model_parallel_size=virtual_pipeline if virtual_pipeline > 1 else None,
        context_parallel_size=context,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=expert_tensor,
        # A timedelta is made of it: minutes need not be whole.
        distributed_timeout_minutes=30 if timeout is None else timeout / _MINUTE,  # pyright: ignore[reportArgumentType]
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    torch.manual_seed(seed)
    return Runtime(
        device=device,
        tp_group=_own(parallel_state.get_tensor_model_parallel_group()),
        pp_group=_own(parallel_state.get_pipeline_model_parallel_group()),
        cp_group=_own(parallel_state.get_context_parallel_group()),
        dp_group=_own(parallel_state.get_data_parallel_group()),
        dp_cp_group=_own(parallel_state.get_data_parallel_group(with_context_parallel=True)),
        tp_cp_group=_own(parallel_state.get_tensor_and_context_parallel_group()),
        ep_group=_own(parallel_state.get_expert_model_parallel_group()),
        etp_group=_own(parallel_state.get_expert_tensor_parallel_group()),
        vp_size=virtual_pipeline,
        sequence_parallel=sequence_parallel,
        token_multiple=token_multiple,
    )


def _check_sizes(
    world_size: int,
    tensor: int,
    pipeline: int,
    virtual_pipeline: int,
    context: int,
    expert: int,
    expert_tensor: int,
) -> None:
    sharing = expert * expert_tensor
    replica = math.lcm(tensor * context, sharing) * pipeline
    if world_size % replica:
        experts = f", their experts shared by {sharing} ranks" if sharing > 1 else ""
        raise ValueError(
            f"{world_size} processes cannot be split into model replicas of "
            f"parallel.tensor {tensor} x parallel.pipeline {pipeline} x parallel.context "
            f"{context}{experts}; start a multiple of {replica}"
        )
    if virtual_pipeline > 1 and pipeline == 1:
        raise ValueError(
            f"{virtual_pipeline} chunks on each pipeline stage interleave over two stages or more; "
            "parallel.pipeline is 1"
        )


def _own(group: object) -> dist.ProcessGroup:
    """parallel_state's group; its other types are for ranks outside and for several pipelines."""
    assert isinstance(group, dist.ProcessGroup)
    return group


def stop(*, leave_job: bool = False) -> None:
    """Undo `start`: drop the groups, so that another split can follow.

    Args:
        leave_job: also leave torch.distributed; a process does this once, at its end.
    """
    # destroy_model_parallel ends a few groups and only forgets the others, whose threads live on.
    groups = parallel_state._global_process_group_list or []
    parallel_state.destroy_model_parallel()
    for group in groups:
        if group is not None:  # None is the job's own
            with suppress(ValueError):  # ended already
                dist.destroy_process_group(group)
    if leave_job:
        dist.destroy_process_group()
