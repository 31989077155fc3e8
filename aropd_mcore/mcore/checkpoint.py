"""Everything a run needs to go on, saved and loaded with Megatron's dist_checkpointing.

    checkpoints/
        iter_0000010/                       one whole checkpoint (torch_dist format, and a manifest)
        latest_checkpointed_iteration.txt   as Megatron-LM names it

A checkpoint is written under a temporary name; its manifest comes last, and the rename is what
makes it exist, so a kill at any moment leaves the one before it (convert/manifest.py).
"""

import os
import random
import secrets
import shutil
import textwrap
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint.api import CheckpointException

from aropd_mcore.convert.architecture import CheckpointError
from aropd_mcore.convert.folders import sync
from aropd_mcore.convert.manifest import (
    FileSum,
    file_sums,
    folder_name,
    iterations,
    problems,
    step_of,
    write_manifest,
)
from aropd_mcore.convert.source import TRACKER
from aropd_mcore.mcore.optim import STATE_FORMAT
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.mcore.student import Student
from aropd_mcore.mcore.teacher import Teacher
from aropd_mcore.mcore.writing import Writing, Written

T = TypeVar("T")

_PACKAGES = ("aropd-mcore", "megatron-core", "torch", "transformers", "numpy")
_PARTIAL, _DELETED, _CORRUPT = ".partial", ".deleted", ".corrupt"


class SaveFailed(RuntimeError):
    """A checkpoint could not be written; the message says why. Raised on every rank alike, and the
    checkpoints before it are as they were."""


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
        asynchronous: bool = False,
    ):
        """Take the values of everything as they are now, and begin to write them.

        Args:
            folder: that exists.
            progress: plain values that belong to the run (counters); the same on every rank.
            about: JSON values for the manifest, beside the progress, layout and package versions.
            asynchronous: the writing goes on in the background, and training may too.
        Raises:
            SaveFailed: the folder is gone, or nothing can be written there.
        Collectives: dist_checkpointing.save's, and broadcasts; every rank must call it.
        """
        self.step = step
        self._started = time.perf_counter()
        self._folder = folder
        self._about = {
            "progress": dict(progress),
            "layout": _layout(runtime),
            "packages": {name: version(name) for name in _PACKAGES},
            **(about or {}),
        }
        self._partial = folder / by_first_rank(self._make_folder)
        student.optimizer.finish_param_gather()
        state = _sharded_state(student, teacher, runtime, is_loading=False)
        state["progress"] = dict(progress)
        state["layout"] = _layout(runtime)
        state["rng"] = _rng_state(runtime)
        self._writing = Writing(state, self._partial, asynchronous=asynchronous)
        self._seconds = time.perf_counter() - self._started

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
        waited = time.perf_counter()
        everybody: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, (written, errors))
        by_first_rank(lambda: self._commit(everybody))
        return self._seconds + _longest(everybody) + time.perf_counter() - waited

    def _make_folder(self) -> str:
        """A name that no process of an attempt before this one can still be writing to."""
        name = f".{folder_name(self.step)}.{secrets.token_hex(4)}{_PARTIAL}"
        if not self._folder.is_dir():
            raise SaveFailed(f"{self._folder}: is gone; was it deleted, or its disk unmounted?")
        try:
            (self._folder / name).mkdir()
        except OSError as error:
            raise SaveFailed(f"{self._folder}: {error.strerror}") from error
        return name

    def _commit(self, everybody: list[tuple[Written, list[str]]]) -> None:
        """On the first rank."""
        path = self._folder / folder_name(self.step)
        try:
            errors = [(rank, w.error) for rank, (w, _) in enumerate(everybody) if w.error]
            errors += [(rank, error) for rank, (_, more) in enumerate(everybody) for error in more]
            for rank, error in errors:
                raise SaveFailed(f"{path}: rank {rank}: {error}{_space(self._folder)}")
            files: dict[str, FileSum] = {}
            for written, _ in everybody:
                files |= written.files
            small = [p.name for p in self._partial.iterdir() if p.name not in files]
            files |= file_sums(self._partial, small)
            write_manifest(self._partial, self.step, files, self._about)
            for name in (*small, "."):
                sync(self._partial / name)
            _delete(path)  # of a run that went back behind it
            self._partial.rename(path)
            sync(self._folder)
            _write_tracker(self._folder, self.step)
        except OSError as error:
            where = error.filename or path
            raise SaveFailed(f"{where}: {error.strerror}{_space(self._folder)}") from error
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)


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
    by_first_rank(lambda: folder.mkdir(parents=True, exist_ok=True))
    Saving(folder, step, student, teacher, progress, runtime).commit()
    return folder / folder_name(step)


def prune(folder: Path, *, keep_last: int, keep_every: int | None = None) -> None:
    """Delete all checkpoints but the newest keep_last, and those of multiples of keep_every steps.

    For the first rank. What cannot be deleted stays.
    """
    for old in iterations(folder)[keep_last:]:
        if keep_every is None or step_of(old) % keep_every:
            with suppress(OSError):
                _delete(old)


def prepare(folder: Path) -> None:
    """Make the folder of a run's checkpoints, or delete from it what killed attempts left behind.

    Raises:
        CheckpointError: nothing can be written there.
    Collectives: a broadcast; every rank must call it.
    """
    by_first_rank(lambda: _prepare(folder))


def _prepare(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{secrets.token_hex(4)}{_PARTIAL}"
        probe.mkdir()  # a folder that is there need not let anything be made in it
        probe.rmdir()
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written to: {error.strerror}") from error
    for suffix in (_PARTIAL, _DELETED):
        for leftover in folder.glob(f".*{suffix}"):
            shutil.rmtree(leftover, ignore_errors=True)


def find(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint under `folder` whose every file is as its manifest says; None if there
    has never been one. Newer ones that are not are set aside, as iter_NNNNNNN.corrupt.

    Returns:
        The checkpoint, and for each of those that were set aside what is wrong with it.
    Raises:
        CheckpointError: there are checkpoints, and none of them is whole.
    Collectives: a gather of objects for each checkpoint that is looked at, and broadcasts. Each
        rank reads its share of the files.
    """
    candidates, num_corrupt = by_first_rank(
        lambda: (iterations(folder), len(list(folder.glob(f"iter_*{_CORRUPT}*"))))
    )
    wrong: dict[Path, list[str]] = {}
    for path in candidates:
        found: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(found, problems(path, dist.get_rank(), dist.get_world_size()))
        wrong[path] = [line for lines in found for line in lines]
        if not wrong[path]:
            del wrong[path]
            return path, by_first_rank(partial(_go_back, path, wrong))
    if candidates or num_corrupt:
        lines = [f"\n  {line}" for lines in wrong.values() for line in lines[:3]]
        raise CheckpointError(
            f"{folder}: none of the {len(candidates) + num_corrupt} checkpoints is whole; put one "
            f"back that is, or move the folder away to start from step 0{''.join(lines)}"
        )
    return None, []


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


def by_first_rank(work: Callable[[], T]) -> T:
    """`work()` of the first rank; what it returns or raises, on every rank alike.

    Collectives: a broadcast of an object over the job; every rank must call it.
    """
    told: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            told = [(work(), None)]
        except Exception as error:
            told = [(None, error)]
    dist.broadcast_object_list(told, src=0)
    result, error = told[0]
    if error is not None:
        raise error
    return result


def _longest(everybody: list[tuple[Written, list[str]]]) -> float:
    return max(written.seconds for written, _ in everybody)


def _space(folder: Path) -> str:
    """Of a disk that is nearly full: what writing says of it is not always that."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return ""
    return f" ({free / 2**20:.0f} MiB are free there)"


def _delete(path: Path) -> None:
    """Delete a checkpoint: under another name, so that no kill leaves a part of it."""
    gone = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_DELETED}")
    with suppress(FileNotFoundError):
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _go_back(path: Path, wrong: Mapping[Path, list[str]]) -> list[str]:
    """Set aside all that is newer than `path` and wrong."""
    notes = [_set_aside(newer, lines) for newer, lines in wrong.items()]
    if notes:
        _write_tracker(path.parent, step_of(path))
    return notes


def _set_aside(path: Path, wrong: list[str]) -> str:
    """What is wrong with a checkpoint and where it is now."""
    aside = path.with_name(path.name + _CORRUPT)
    for number in range(2, 1000):
        if not aside.exists():
            break
        aside = path.with_name(f"{path.name}{_CORRUPT}{number}")
    try:
        path.rename(aside)
    except OSError as error:
        return f"{wrong[0]}; not used ({error.strerror})"
    return f"{wrong[0]}; set aside as {aside.name}"


def _write_tracker(folder: Path, step: int) -> None:
    temporary = folder / f".{TRACKER}"
    temporary.write_text(str(step))
    os.replace(temporary, folder / TRACKER)
