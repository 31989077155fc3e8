"""Everything a run needs to go on, saved and loaded with Megatron's dist_checkpointing.

    checkpoints/
        iter_0000010/                       one whole checkpoint (torch_dist format)
        latest_checkpointed_iteration.txt   as Megatron-LM names it

A checkpoint is written under a temporary name; its rename is what makes it exist, so a kill at any
moment leaves the one before it.
"""

import os
import re
import shutil
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint.api import CheckpointException

from aropd_mcore.convert.architecture import CheckpointError
from aropd_mcore.convert.source import TRACKER
from aropd_mcore.mcore.optim import STATE_FORMAT
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.mcore.student import Student
from aropd_mcore.mcore.teacher import Teacher

_NAME = re.compile(r"iter_(\d{7})")


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint under `folder`, or None."""
    found = [p for p in folder.glob("iter_*") if _NAME.fullmatch(p.name)]
    return max(found, key=step_of, default=None)


def step_of(path: Path) -> int:
    """Number of training steps that the checkpoint at `path` has seen."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path}: expected a folder named iter_NNNNNNN")
    return int(match[1])


def save(
    folder: Path,
    step: int,
    student: Student,
    teacher: Teacher | None,
    progress: Mapping[str, Any],
    runtime: Runtime,
    *,
    keep_last: int,
) -> Path:
    """Write a checkpoint of `step` steps and delete all but the newest `keep_last`.

    Args:
        progress: plain values that belong to the run (counters); the same on every rank.
    Returns:
        The checkpoint's folder.
    Collectives: dist_checkpointing.save's, and barriers; every rank must call it.
    """
    path = folder / f"iter_{step:07d}"
    partial = folder / f".{path.name}.partial"
    if runtime.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    student.optimizer.finish_param_gather()
    state = _sharded_state(student, teacher, runtime, is_loading=False)
    state["progress"] = dict(progress)
    state["layout"] = _layout(runtime)
    state["rng"] = _rng_state(runtime)
    dist_checkpointing.save(state, str(partial))
    dist.barrier()
    if runtime.rank == 0:
        shutil.rmtree(path, ignore_errors=True)
        os.replace(partial, path)
        _write_tracker(folder, step)
        for old in sorted(folder.glob("iter_*"), key=step_of)[:-keep_last]:
            shutil.rmtree(old)
    dist.barrier()
    return path


def load(path: Path, student: Student, teacher: Teacher | None, runtime: Runtime) -> dict[str, Any]:
    """Take over a checkpoint, whatever layout wrote it.

    Random-number state is restored when the layout is the one that wrote it; it belongs to ranks,
    and nothing of a step depends on it (rollouts have seeds of their own).

    Returns:
        The progress that `save` was given.
    Raises:
        CheckpointError: the folder is no checkpoint, or lacks what this run needs.
    Collectives: dist_checkpointing.load's; every rank must call it.
    """
    common = read_common(path)
    state = _sharded_state(student, teacher, runtime, is_loading=True)
    same_layout = common["layout"] == _layout(runtime)
    if same_layout:
        state["rng"] = _rng_state(runtime)
    loaded = _load_sharded(path, state)
    for index, chunk in enumerate(student.model):
        chunk.load_state_dict(loaded["model"][str(index)])
    student.optimizer.load_state_dict(loaded)
    if teacher is not None:
        teacher.load_state_dict(loaded["teacher"])
    if same_layout:
        _restore_rng(loaded["rng"], runtime)
    return common["progress"]


def read_common(path: Path) -> dict[str, Any]:
    """What of a checkpoint is the same on every rank: progress, layout, schedule.

    Raises:
        CheckpointError: `path` is not a checkpoint of this program.
    """
    try:
        common = dist_checkpointing.load_common_state_dict(str(path))
    except Exception as error:
        raise CheckpointError(f"{path}: not a checkpoint: {error}") from error
    if "progress" not in common:
        raise CheckpointError(f"{path}: a checkpoint, but not of an aropd run (no progress in it)")
    return common


def _load_sharded(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    try:
        return cast(dict[str, Any], dist_checkpointing.load(state, str(path)))
    except CheckpointException as error:  # torch's, which is no Exception; one failure a rank
        first, _ = next(iter(error.failures.values()))
        raise _does_not_hold(path, first) from error
    except Exception as error:  # Megatron's and the file system's, by many names
        raise _does_not_hold(path, error) from error


def _does_not_hold(path: Path, error: BaseException) -> CheckpointError:
    # They begin with the tensor in question, and go on with a list of all that there are.
    reason = textwrap.shorten(str(error).strip("\"'"), 200, placeholder=" ...")
    reason = reason or type(error).__name__  # a file that is cut short is an EOFError, no more
    return CheckpointError(f"{path}: does not hold what is needed here: {reason}")


def _sharded_state(
    student: Student, teacher: Teacher | None, runtime: Runtime, *, is_loading: bool
) -> dict[str, Any]:
    metadata = {
        "distrib_optim_sharding_type": STATE_FORMAT,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": runtime.dp_cp_group,
    }
    state: dict[str, Any] = {"model": student.model.sharded_state_dict(metadata=metadata)}
    state |= student.optimizer.sharded_state_dict(state, metadata, is_loading=is_loading)
    if teacher is not None:
        state["teacher"] = teacher.sharded_state_dict(metadata)
    return state


def _layout(runtime: Runtime) -> dict[str, int]:
    return {
        "tensor": runtime.tp_size,
        "pipeline": runtime.pp_size,
        "virtual_pipeline": runtime.vp_size,
        "context": runtime.cp_size,
        "expert": runtime.ep_size,
        "expert_tensor": runtime.etp_size,
        "data": runtime.dp_size,
    }


def _rng_state(runtime: Runtime) -> ShardedObject:
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "tracker": _tracker().get_states(),
    }
    if runtime.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state()
    return ShardedObject(
        "rng",
        state,
        (runtime.pp_size, runtime.tp_size, runtime.dp_cp_group.size()),
        (runtime.pp_rank, runtime.tp_rank, runtime.dp_cp_group.rank()),
    )


def _restore_rng(state: dict[str, Any], runtime: Runtime) -> None:
    torch.set_rng_state(state["torch"])
    _tracker().set_states(state["tracker"])
    if runtime.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"])


def _tracker() -> Any:
    """Megatron's named random-number states (runtime.start makes them)."""
    return tensor_parallel.get_cuda_rng_tracker()


def _write_tracker(folder: Path, step: int) -> None:
    temporary = folder / f".{TRACKER}"
    temporary.write_text(str(step))
    os.replace(temporary, folder / TRACKER)
