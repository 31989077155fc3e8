"""The folder of a run's checkpoints: which are there, which is whole, which stay.

Rank 0 changes it, and every rank learns of the result or the error (mcore.rank0.run_on_rank0).
"""

import os
import secrets
import shutil
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from aropd_mcore.convert.architecture import CheckpointError
from aropd_mcore.convert.folders import sync
from aropd_mcore.convert.manifest import (
    FileSum,
    file_sums,
    folder_name,
    iterations,
    parse_step,
    problems,
    write_manifest,
)
from aropd_mcore.convert.source import TRACKER
from aropd_mcore.mcore.rank0 import run_on_rank0

_PARTIAL, _DELETED, _CORRUPT = ".partial", ".deleted", ".corrupt"


class SaveFailed(RuntimeError):
    """A checkpoint could not be written; the message says why. Raised on every rank alike, and the
    checkpoints before it are as they were."""


def prune(folder: Path, *, keep_last: int, keep_every: int | None = None) -> None:
    """Delete all checkpoints but the newest keep_last, and those of multiples of keep_every steps.

    For the first rank. What cannot be deleted stays.
    """
    for old in iterations(folder)[keep_last:]:
        if keep_every is None or parse_step(old) % keep_every:
            with suppress(OSError):
                _delete(old)


def prepare(folder: Path) -> None:
    """Make the folder of a run's checkpoints, or delete from it what killed attempts left behind.

    Raises:
        CheckpointError: nothing can be written there.
    Collectives: a broadcast; every rank must call it.
    """
    run_on_rank0(lambda: _prepare(folder))


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
    candidates, num_corrupt = run_on_rank0(
        lambda: (iterations(folder), len(list(folder.glob(f"iter_*{_CORRUPT}*"))))
    )
    wrong: dict[Path, list[str]] = {}
    for path in candidates:
        found: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(found, problems(path, dist.get_rank(), dist.get_world_size()))
        wrong[path] = [line for lines in found for line in lines]
        if not wrong[path]:
            del wrong[path]
            return path, run_on_rank0(partial(_go_back, path, wrong))
    if candidates or num_corrupt:
        lines = [f"\n  {line}" for lines in wrong.values() for line in lines[:3]]
        raise CheckpointError(
            f"{folder}: none of the {len(candidates) + num_corrupt} checkpoints is whole; put one "
            f"back that is, or move the folder away to start from step 0{''.join(lines)}"
        )
    return None, []


def new_partial(folder: Path, step: int) -> Path:
    """A folder for a checkpoint's files until it is whole, under a name that no process of an
    attempt before this one can still be writing to. For the first rank.

    Raises:
        SaveFailed: it cannot be made.
    """
    path = folder / f".{folder_name(step)}.{secrets.token_hex(4)}{_PARTIAL}"
    if not folder.is_dir():
        raise SaveFailed(f"{folder}: is gone; was it deleted, or its disk unmounted?")
    try:
        path.mkdir()
    except OSError as error:
        raise SaveFailed(f"{folder}: {error.strerror}") from error
    return path


def make_whole(
    path: Path, step: int, files: Mapping[str, FileSum], about: Mapping[str, Any]
) -> None:
    """Make a checkpoint of what was written to `path`, of new_partial. For the first rank.

    Args:
        files: that are on the disk already, with their sums; others are seen to here.
        about: for the manifest.
    Raises:
        SaveFailed: the disk is full, or gone.
    """
    target = path.parent / folder_name(step)
    try:
        small = [file.name for file in path.iterdir() if file.name not in files]
        sums = {**files, **file_sums(path, small)}
        for name in small:
            sync(path / name)
        write_manifest(path, step, sums, about)
        sync(path)
        _delete(target)  # of a run that went back behind it
        path.rename(target)
        sync(path.parent)
        _write_tracker(path.parent, step)
    except OSError as error:
        raise SaveFailed(give_up(path, step, str(error.strerror), error.filename)) from error


def give_up(path: Path, step: int, why: str, where: str | None = None) -> str:
    """Delete what was written to `path`, of new_partial; what to say of it. For the first rank."""
    space = ""
    with suppress(OSError):  # a disk that is full is not always called so
        space = f" ({shutil.disk_usage(path.parent).free / 2**20:.0f} MiB are free there)"
    shutil.rmtree(path, ignore_errors=True)
    return f"{where or path.parent / folder_name(step)}: {why}{space}"


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
        _write_tracker(path.parent, parse_step(path))
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
