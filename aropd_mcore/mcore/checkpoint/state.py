"""Saving and loading of a run's whole state in the format of Megatron's dist_checkpointing.

    checkpoints/
        iter_0000010/                       one checkpoint (torch_dist format, and a manifest)
        latest_checkpointed_iteration.txt   Megatron-LM's name

shards.py divides the tensors over the ranks. A checkpoint is written under a temporary name. Its
manifest is written last, and then the folder is renamed. A kill at any moment therefore leaves the
previous checkpoint (convert/manifest.py).
"""

import random
import textwrap
import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, merge
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from torch.distributed.checkpoint.api import CheckpointException

from aropd_mcore.convert.architecture import CheckpointError
from aropd_mcore.convert.manifest import FileSum, folder_name
from aropd_mcore.mcore.checkpoint import shards
from aropd_mcore.mcore.checkpoint.directory import (
    SaveFailed,
    give_up,
    make_whole,
    new_partial,
)
from aropd_mcore.mcore.checkpoint.shards import Box
from aropd_mcore.mcore.checkpoint.writer import Writing, Written
from aropd_mcore.mcore.groups import gather_objects
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
"""Packages whose versions are in every checkpoint, with their modules. The version is read from the
module, because on clusters Megatron and this package are often folders on PYTHONPATH without
metadata of pip."""


class Saving:
    """A checkpoint that is being written. It is complete when `commit` returns."""

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
        """Take a snapshot of the run's state, and start writing it in the background.

        Args:
            folder: an existing folder.
            progress: plain values of the run, such as counters, the same on every rank.
            about: JSON values for the manifest, in addition to the progress, layout and package
                versions.
        Raises:
            SaveFailed: the folder does not exist or is not writable.
        Collectives: those of dist_checkpointing.save, and broadcasts. Every rank must call it.
        """
        self.step = step
        started = time.perf_counter()
        self._about = {
            "progress": dict(progress),
            "layout": _layout(runtime),
            "packages": {
                name: import_module(module).__version__ for name, module in _PACKAGES.items()
            },
            **(about or {}),
        }
        self._partial = run_on_rank0(lambda: new_partial(folder, step))
        _, state, boxes = _contents(student, teacher, runtime)
        state |= {
            "tensors": {str(i): box.as_sharded() for i, box in enumerate(boxes)},
            "progress": dict(progress),
            "layout": _layout(runtime),
            "rng": _rng_state(runtime),
            **student.optimizer.state_dict(),
        }
        self._writing = Writing(state, self._partial)
        self._seconds = time.perf_counter() - started

    def is_written(self) -> bool:
        """Return whether all ranks have written, so that `commit` need not wait.

        Collectives: an all-reduce over the job, and those of Writing.finish once all ranks have
            written. Every rank must call it.
        """
        return self._writing.is_done()

    def commit(self) -> float:
        """Wait until every rank has written its part, and complete the checkpoint.

        Returns:
            Seconds that the save took, without the training that ran meanwhile.
        Raises:
            SaveFailed: a rank could not write, or the disk is full.
        Collectives: Megatron's, an all-gather and a broadcast. Every rank must call it.
        """
        # The wait for the writing processes is not timed. Each process measures its own seconds.
        written, errors = self._writing.finish()
        started = time.perf_counter()
        results = gather_objects((written, errors))
        run_on_rank0(
            lambda: make_whole(self._partial, self.step, self._files(results), self._about)
        )
        writing = max(written.seconds for written, _ in results)
        return self._seconds + writing + time.perf_counter() - started

    def _files(self, results: list[tuple[Written, list[str]]]) -> dict[str, FileSum]:
        """Return the files that all ranks have written. Raise SaveFailed if a rank has an error."""
        errors = [(rank, w.error) for rank, (w, _) in enumerate(results) if w.error]
        errors += [(rank, error) for rank, (_, more) in enumerate(results) for error in more]
        if errors:
            rank, error = errors[0]
            raise SaveFailed(give_up(self._partial, self.step, f"rank {rank}: {error}"))
        return {name: s for written, _ in results for name, s in written.files.items()}


def save(
    folder: Path,
    step: int,
    student: Student,
    teacher: Teacher | None,
    progress: Mapping[str, Any],
    runtime: Runtime,
) -> Path:
    """Write a checkpoint of `step` steps and wait until it is complete.

    The arguments, errors and collectives are those of Saving. `folder` is created if it is missing.

    Returns:
        The checkpoint's folder.
    """
    run_on_rank0(lambda: folder.mkdir(parents=True, exist_ok=True))
    Saving(folder, step, student, teacher, progress, runtime).commit()
    return folder / folder_name(step)


def load(path: Path, student: Student, teacher: Teacher | None, runtime: Runtime) -> dict[str, Any]:
    """Load a checkpoint, written by any layout, into the student and the teacher.

    Random-number states belong to ranks, so they are restored only if the checkpoint has the same
    layout. No part of a step depends on them, since rollouts have their own seeds.

    Returns:
        The `progress` of the save.
    Raises:
        CheckpointError: the folder is not a checkpoint, or lacks a tensor that this run needs.
    Collectives: broadcasts, those of the functions of shards.py, and those of
        dist_checkpointing.load. Every rank must call it.
    """
    tensors, objects, boxes = _contents(student, teacher, runtime)
    same_layout = run_on_rank0(lambda: read_common(path))["layout"] == _layout(runtime)
    if same_layout:
        objects["rng"] = _rng_state(runtime)
    shards.read(path, boxes)
    shards.broadcast_shares(tensors, runtime)
    loaded = _load_objects(path, objects)
    dict_list_map_inplace(lambda tensor: tensor.data.detach(), tensors)
    merge(loaded, tensors)
    if student.model.adapters is None:  # an adapter's tensors have been read into its memory
        for index, chunk in enumerate(student.model):
            chunk.load_state_dict(loaded["model"][str(index)])
    student.optimizer.load_state_dict(loaded)
    if teacher is not None:
        teacher.load_state_dict(loaded.get("teacher", {}))
    if same_layout:
        _restore_rng(loaded["rng"], runtime)
    return loaded["progress"]


def read_common(path: Path) -> dict[str, Any]:
    """Read the part of a checkpoint that is the same on every rank: progress, layout, schedule.

    Raises:
        CheckpointError: `path` is not a checkpoint of this program.
    """
    try:
        common = dist_checkpointing.load_common_state_dict(str(path))
    except Exception as error:
        raise CheckpointError(f"{path}: not a checkpoint: {error}") from error
    if "progress" not in common:
        raise CheckpointError(
            f"{path}: a checkpoint without the progress of a run; expected a checkpoint that "
            "`aropd train` has written"
        )
    return common


def _load_objects(path: Path, objects: dict[str, Any]) -> dict[str, Any]:
    try:
        return cast(dict[str, Any], dist_checkpointing.load(objects, str(path)))
    except CheckpointException as error:  # torch's, not an Exception; has one failure per rank
        first, _ = next(iter(error.failures.values()))
        raise _load_error(path, first) from error
    except Exception as error:  # Megatron and the file system raise many types
        raise _load_error(path, error) from error


def _load_error(path: Path, error: BaseException) -> CheckpointError:
    # Messages begin with the object in question. A list of all objects may follow.
    reason = textwrap.shorten(str(error).strip("\"'"), 200, placeholder=" ...")
    reason = reason or type(error).__name__  # a truncated file raises EOFError without a message
    return CheckpointError(f"{path}: cannot be loaded into this run: {reason}")


def _contents(
    student: Student, teacher: Teacher | None, runtime: Runtime
) -> tuple[dict[str, Any], dict[str, Any], list[Box]]:
    """Return what a checkpoint consists of.

    Returns:
        The models' tensors, `{"model": ..., "teacher": ...}`, in Megatron's form. Without those of
            a teacher whose average is saved instead.
        The models' other values, such as the statistics of FP8, in the same form.
        This rank's boxes of the models' tensors and of the optimizer's.
    """
    metadata = {"singleton_local_shards": False, "dp_cp_group": runtime.dp_cp_group}
    models = {"model": student.model.sharded_state_dict(metadata=metadata)}
    if teacher is not None:
        models["teacher"] = teacher.sharded_state_dict(metadata)
    tensors, objects = extract_sharded_tensors_and_factories(models)
    boxes: list[Box] = []
    if teacher is not None and teacher.average is not None:
        boxes += shards.average_boxes(teacher.average, tensors.pop("teacher"), runtime)
    boxes += shards.model_boxes(tensors, runtime)
    optimizers = student.optimizer.inner.chained_optimizers
    boxes += shards.optimizer_boxes(optimizers, models["model"], runtime)
    return tensors, objects, boxes


def _layout(runtime: Runtime) -> dict[str, int | str]:
    splits = asdict(runtime.stages)  # null settings are left out
    return {
        "tensor": runtime.tp_size,
        **{name: value for name, value in splits.items() if value is not None},
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
    """Return the state of numpy's global generator as plain values, which torch.load accepts."""
    name, keys, *rest = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    return (name, keys.tolist(), *rest)


def _tracker() -> Any:
    """Return Megatron's named random-number states, which runtime.start creates."""
    return tensor_parallel.get_cuda_rng_tracker()
