"""Everything a run needs to go on, saved and loaded with Megatron's dist_checkpointing.

    checkpoints/
        iter_0000010/                       one whole checkpoint (torch_dist format, and a manifest)
        latest_checkpointed_iteration.txt   as Megatron-LM names it

A checkpoint is written under a temporary name; its manifest comes last, and the rename is what
makes it exist, so a kill at any moment leaves the one before it (convert/manifest.py).
"""

import random
import textwrap
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint.api import CheckpointException

from aropd_mcore.convert.architecture import CheckpointError
from aropd_mcore.convert.manifest import FileSum, folder_name
from aropd_mcore.mcore.checkpoint.directory import (
    SaveFailed,
    give_up,
    make_whole,
    new_partial,
)
from aropd_mcore.mcore.checkpoint.writer import Writing, Written
from aropd_mcore.mcore.optim import STATE_FORMAT
from aropd_mcore.mcore.rank0 import run_on_rank0
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.mcore.student import Student
from aropd_mcore.mcore.teacher import Teacher

_PACKAGES = {
    "aropd-mcore": "aropd_mcore",
    "megatron-core": "megatron.core",
    "torch": "torch",
    "transformers": "transformers",
    "numpy": "numpy",
}
"""Named in every checkpoint. The modules are asked: on a cluster Megatron, and this package, are
often folders on PYTHONPATH, of which pip knows nothing."""


class Saving:
    """A checkpoint that is being written; it exists when `commit` returns."""

    def __init__(
        self,
        folder: Path,
        step: int,
        student: Student,
        teacher: Teacher | None,
        progress: Mapping[str, Any],
        runtime: Runtime,
        *,
        about: Mapping[str, Any] | None = None,
    ):
        """Take the values of everything as they are now, and begin to write them in the background.

        Args:
            folder: that exists.
            progress: plain values that belong to the run (counters); the same on every rank.
            about: JSON values for the manifest, beside the progress, layout and package versions.
        Raises:
            SaveFailed: the folder is gone, or nothing can be written there.
        Collectives: dist_checkpointing.save's, and broadcasts; every rank must call it.
        """
        self.step = step
        started = time.perf_counter()
        self._about = {
            "progress": dict(progress),
            "layout": _layout(runtime),
            "packages": {name: import_module(of).__version__ for name, of in _PACKAGES.items()},
            **(about or {}),
        }
        self._partial = run_on_rank0(lambda: new_partial(folder, step))
        state = _sharded_state(student, teacher, runtime, is_loading=False)
        state["progress"] = dict(progress)
        state["layout"] = _layout(runtime)
        state["rng"] = _rng_state(runtime)
        self._writing = Writing(state, self._partial)
        self._seconds = time.perf_counter() - started

    def is_written(self) -> bool:
        """Whether `commit` would have nothing to wait for.

        Collectives: an all-reduce over the job; every rank must call it.
        """
        return self._writing.is_done()

    def commit(self) -> float:
        """Wait until every rank has written its share, and make the checkpoint exist.

        Returns:
            Seconds that the save has taken, not counting what training did meanwhile.
        Raises:
            SaveFailed: a rank could not write, or the disk is full.
        Collectives: Megatron's, a gather and a broadcast; every rank must call it.
        """
        # What is waited for here is part of what the writing process says of itself.
        written, errors = self._writing.finish()
        started = time.perf_counter()
        everybody: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, (written, errors))
        run_on_rank0(
            lambda: make_whole(self._partial, self.step, self._files(everybody), self._about)
        )
        writing = max(written.seconds for written, _ in everybody)
        return self._seconds + writing + time.perf_counter() - started

    def _files(self, everybody: list[tuple[Written, list[str]]]) -> dict[str, FileSum]:
        """The files that all ranks have written, if they could."""
        errors = [(rank, w.error) for rank, (w, _) in enumerate(everybody) if w.error]
        errors += [(rank, error) for rank, (_, more) in enumerate(everybody) for error in more]
        if errors:
            rank, error = errors[0]
            raise SaveFailed(give_up(self._partial, self.step, f"rank {rank}: {error}"))
        return {name: s for written, _ in everybody for name, s in written.files.items()}


def save(
    folder: Path,
    step: int,
    student: Student,
    teacher: Teacher | None,
    progress: Mapping[str, Any],
    runtime: Runtime,
) -> Path:
    """Write a checkpoint of `step` steps and wait for it; arguments, errors and collectives as
    Saving's.

    Returns:
        The checkpoint's folder.
    """
    run_on_rank0(lambda: folder.mkdir(parents=True, exist_ok=True))
    Saving(folder, step, student, teacher, progress, runtime).commit()
    return folder / folder_name(step)


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
        "python": random.getstate(),
        "numpy": _numpy_state(),
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
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    if runtime.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"])


def _numpy_state() -> tuple[Any, ...]:
    """Of numpy's global generator, in plain values, which is what torch.load takes."""
    name, keys, *rest = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    return (name, keys.tolist(), *rest)


def _tracker() -> Any:
    """Megatron's named random-number states (runtime.start makes them)."""
    return tensor_parallel.get_cuda_rng_tracker()
