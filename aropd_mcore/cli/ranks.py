"""Work as one rank of a job, and the start of jobs of several processes."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from aropd_mcore.config import ParallelConfig
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


def num_local_processes(args: argparse.Namespace, parallel: ParallelConfig) -> int:
    """Return --nproc-per-node or its default."""
    if args.nproc_per_node:
        return args.nproc_per_node
    import torch

    from aropd_mcore.plan.layout import replica_size

    return torch.cuda.device_count() if torch.cuda.is_available() else replica_size(parallel)


def run_as_ranks(args: argparse.Namespace, spec: "GenerationSpec", work: Callable[[], int]) -> int:
    """Run this process's part of a sampling job, or start the job's processes and wait.

    Returns:
        The exit code.
    """
    from aropd_mcore.plan.layout import replica_size

    num_local = num_local_processes(args, spec.parallel)
    num_all = int(os.environ.get("WORLD_SIZE", num_local))
    if num_all % replica_size(spec.parallel):
        raise ValueError(
            f"{num_all} processes: expected a multiple of {replica_size(spec.parallel)}, the size "
            "of one model replica in this layout"
        )
    if "RANK" in os.environ or num_local == 1:
        return work()
    return start_ranks(num_local, args.argv)


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
