"""The folder of a run's checkpoints: creation, search and deletion of checkpoints.

Only rank 0 changes the folder. Every rank gets the result or the error (mcore.rank0.run_on_rank0).
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
from aropd_mcore.convert.source import BEST, TRACKER
from aropd_mcore.mcore.groups import gather_objects
from aropd_mcore.mcore.rank0 import run_on_rank0

_PARTIAL, _DELETED, _CORRUPT = ".partial", ".deleted", ".corrupt"


class SaveFailed(RuntimeError):
    """Error: a checkpoint could not be written. The message states the reason.

    It is raised on every rank. Earlier checkpoints are unchanged.
    """


def prune(folder: Path, *, keep_last: int, keep_every: int | None = None) -> None:
    """Delete old checkpoints, except for the best one. Call on rank 0 only.

    Errors of deletion are ignored.

    Args:
        keep_last: number of the newest checkpoints to keep.
        keep_every: also keep checkpoints whose step is a multiple of this number.
    """
    best = (folder / BEST).resolve()
    for old in iterations(folder)[keep_last:]:
        if old.resolve() != best and (keep_every is None or parse_step(old) % keep_every):
            with suppress(OSError):
                _delete(old)


def mark_best(folder: Path, step: int) -> None:
    """Let `best` link to the checkpoint after `step` steps. Call on rank 0 only.

    Raises:
        SaveFailed: the link cannot be written.
    """
    temporary = folder / f".{BEST}"
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(folder_name(step))
        os.replace(temporary, folder / BEST)
        sync(folder)
    except OSError as error:
        raise SaveFailed(f"{folder / BEST}: {error.strerror}") from error


def prepare(folder: Path) -> None:
    """Create the folder of a run's checkpoints, and delete leftovers of killed attempts from it.

    Raises:
        CheckpointError: the folder is not writable.
    Collectives: a broadcast. Every rank must call it.
    """
    run_on_rank0(lambda: _prepare(folder))


def _prepare(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{secrets.token_hex(4)}{_PARTIAL}"
        probe.mkdir()  # an existing folder may be read-only
        probe.rmdir()
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written to: {error.strerror}") from error
    for suffix in (_PARTIAL, _DELETED):
        for leftover in folder.glob(f".*{suffix}"):
            shutil.rmtree(leftover, ignore_errors=True)


def find(folder: Path) -> tuple[Path | None, list[str]]:
    """Find the newest intact checkpoint under `folder`: every file matches the manifest.

    Newer, damaged checkpoints are renamed to iter_NNNNNNN.corrupt.

    Returns:
        The checkpoint, or None if there has never been one. For each renamed checkpoint, a note
        that describes the damage.
    Raises:
        CheckpointError: there are checkpoints, but none of them is intact.
    Collectives: an all-gather of objects for each checkpoint that is checked, and broadcasts. Every
        rank must call it. Each rank reads a part of the files.
    """
    candidates, num_corrupt = run_on_rank0(
        lambda: (iterations(folder), len(list(folder.glob(f"iter_*{_CORRUPT}*"))))
    )
    damages: dict[Path, list[str]] = {}
    for path in candidates:
        parts = gather_objects(problems(path, dist.get_rank(), dist.get_world_size()))
        damages[path] = [line for lines in parts for line in lines]
        if not damages[path]:
            del damages[path]
            return path, run_on_rank0(partial(_set_all_aside, damages, path))
    if candidates or num_corrupt:
        lines = [f"\n  {line}" for lines in damages.values() for line in lines[:3]]
        raise CheckpointError(
            f"{folder}: none of the {len(candidates) + num_corrupt} checkpoints is intact; "
            "restore an intact one, or move the folder away to start from step 0"
            f"{''.join(lines)}"
        )
    return None, []


def new_partial(folder: Path, step: int) -> Path:
    """Create a folder for a checkpoint's files until it is complete. Call on rank 0 only.

    Its name is random, because a process of an earlier attempt may still be writing.

    Raises:
        SaveFailed: the folder cannot be created.
    """
    path = folder / f".{folder_name(step)}.{secrets.token_hex(4)}{_PARTIAL}"
    if not folder.is_dir():
        raise SaveFailed(f"{folder}: is missing; was it deleted, or its disk unmounted?")
    try:
        path.mkdir()
    except OSError as error:
        raise SaveFailed(f"{folder}: {error.strerror}") from error
    return path


def make_whole(
    path: Path, step: int, files: Mapping[str, FileSum], about: Mapping[str, Any]
) -> None:
    """Turn the folder of new_partial into a checkpoint. Call on rank 0 only.

    Args:
        path: the folder, with all files of the checkpoint but the manifest.
        files: files that are already synced to the disk, with their checksums. The other files are
            synced here.
        about: JSON values for the manifest.
    Raises:
        SaveFailed: the files cannot be written, for example because the disk is full.
    """
    target = path.parent / folder_name(step)
    try:
        small = [file.name for file in path.iterdir() if file.name not in files]
        sums = {**files, **file_sums(path, small)}
        for name in small:
            sync(path / name)
        write_manifest(path, step, sums, about)
        sync(path)
        _delete(target)  # exists if the run resumed from an earlier checkpoint
        path.rename(target)
        sync(path.parent)
        _write_tracker(path.parent, step)
    except OSError as error:
        raise SaveFailed(give_up(path, step, str(error.strerror), error.filename)) from error


def give_up(path: Path, step: int, why: str, where: str | None = None) -> str:
    """Delete the folder of new_partial and return an error message. Call on rank 0 only."""
    space = ""
    with suppress(OSError):  # errors of a full disk do not always state that it is full
        space = f" ({shutil.disk_usage(path.parent).free / 2**20:.0f} MiB are free there)"
    shutil.rmtree(path, ignore_errors=True)
    return f"{where or path.parent / folder_name(step)}: {why}{space}"


def _delete(path: Path) -> None:
    """Delete a checkpoint after a rename, so that a kill cannot leave a damaged checkpoint."""
    renamed = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_DELETED}")
    with suppress(FileNotFoundError):
        path.rename(renamed)
        shutil.rmtree(renamed, ignore_errors=True)


def _set_all_aside(damages: Mapping[Path, list[str]], newest: Path) -> list[str]:
    """Rename damaged checkpoints, make `newest` the latest one, and return a note per rename."""
    notes = [_set_aside(damaged, lines) for damaged, lines in damages.items()]
    if notes:
        _write_tracker(newest.parent, parse_step(newest))
    return notes


def _set_aside(path: Path, damage: list[str]) -> str:
    """Rename a damaged checkpoint. Return a note with the damage and the new name."""
    aside = path.with_name(path.name + _CORRUPT)
    for number in range(2, 1000):
        if not aside.exists():
            break
        aside = path.with_name(f"{path.name}{_CORRUPT}{number}")
    try:
        path.rename(aside)
    except OSError as error:
        return f"{damage[0]}; ignored, since it cannot be renamed: {error.strerror}"
    return f"{damage[0]}; renamed to {aside.name}"


def _write_tracker(folder: Path, step: int) -> None:
    temporary = folder / f".{TRACKER}"
    temporary.write_text(str(step))
    os.replace(temporary, folder / TRACKER)
