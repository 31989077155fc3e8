"""Work as one rank of a job, and the start of jobs of several processes."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aropd_mcore.config import ConfigError, ParallelConfig, RolloutConfig
from aropd_mcore.local_launch import start_ranks

if TYPE_CHECKING:
    from aropd_mcore.mcore.runtime import Runtime
    from aropd_mcore.rollout.generation_spec import GenerationSpec


def add_num_processes_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--nproc-per-node",
        type=int,
        metavar="N",
        help="number of processes to start (default: one per GPU; without GPUs, as many as one "
        "model replica needs)",
    )


@dataclass(frozen=True)
class LocalRanks:
    """Ranks of this machine."""

    count: int
    gpus: list[str] | None
    """GPUs that the ranks see, as in CUDA_VISIBLE_DEVICES. None: those that this process sees."""

    @property
    def is_this_process(self) -> bool:
        """Whether this process is a rank already, or can be the only one."""
        return "RANK" in os.environ or (self.count == 1 and self.gpus is None)

    def start(self, arguments: Sequence[str]) -> int:
        """Start the ranks and wait for their end; see start_ranks."""
        return start_ranks(self.count, arguments, gpus=self.gpus)


def local_ranks(
    args: argparse.Namespace, parallel: ParallelConfig, rollout: RolloutConfig
) -> LocalRanks:
    """Return the ranks of --nproc-per-node, or one per GPU that no vLLM server of the run uses.

    Raises:
        ConfigError: the servers leave too few GPUs, or this process is a rank on a server's GPU.
    """
    from aropd_mcore.plan.gpu_share import check_rank_gpus, training_gpus
    from aropd_mcore.plan.layout import replica_size

    visible, number = visible_gpus(), args.nproc_per_node
    if not visible:
        return LocalRanks(number or replica_size(parallel), None)
    if "RANK" in os.environ:
        rank, index = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
        if rank == index and index < len(visible):  # on the first machine, which has the servers
            remedy = "start fewer ranks per machine, or set CUDA_VISIBLE_DEVICES to other GPUs"
            check_rank_gpus(rollout, {rank: visible[index]}, remedy=remedy)
        return LocalRanks(number or len(visible), None)
    left = training_gpus(rollout, visible)
    if left == visible:
        return LocalRanks(number or len(visible), None)
    if number and number > len(left):
        raise ConfigError(
            f"--nproc-per-node {number}: expected at most {len(left)}, the GPUs that "
            f"rollout.vllm.devices leaves to training ({', '.join(left)})"
        )
    return LocalRanks(number or len(left), left[: number or len(left)])


def visible_gpus() -> list[str]:
    """Return the names of the GPUs that this process sees, as in CUDA_VISIBLE_DEVICES."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    return names[:count] if names[0] else [str(index) for index in range(count)]


def run_as_ranks(args: argparse.Namespace, spec: "GenerationSpec", work: Callable[[], int]) -> int:
    """Run this process's part of a sampling job, or start the job's processes and wait.

    Returns:
        The exit code.
    """
    from aropd_mcore.plan.layout import replica_size

    ranks = local_ranks(args, spec.parallel, spec.rollout)
    num_all = int(os.environ.get("WORLD_SIZE", ranks.count))
    if num_all % replica_size(spec.parallel):
        raise ValueError(
            f"{num_all} processes: expected a multiple of {replica_size(spec.parallel)}, the size "
            "of one model replica in this layout"
        )
    if ranks.is_this_process:
        return work()
    return ranks.start(args.argv)


def sample_here(spec: "GenerationSpec", work: "Callable[[Runtime], None]") -> int:
    """Run this rank's part of a sampling job.

    Returns:
        The exit code: 0, or 3 if the rollout engine has failed for good.
    """
    from aropd_mcore.mcore import runtime
    from aropd_mcore.rollout.engine import RolloutFailed
    from aropd_mcore.rollout.generate import start_generation_runtime

    here = start_generation_runtime(spec)
    try:
        work(here)
    except RolloutFailed as failed:
        if here.rank == 0:
            print(f"aropd: stopped: {failed}\nRerun the command to resume.", file=sys.stderr)
        return 3
    runtime.stop()
    return 0


def joined_job() -> bool:
    """Return whether this process has initialized torch.distributed."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()


def leave_job() -> None:
    """Destroy the process groups of torch.distributed and Megatron, if there are any."""
    if joined_job():
        from aropd_mcore.mcore import runtime

        runtime.stop(leave_job=True)
