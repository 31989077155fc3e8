"""Atomic writing of folders, and the small files that belong to a checkpoint's weights."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from aropd_mcore.convert.hf_io import ADAPTER_FILES, INDEX, PICKLE_INDEX, PICKLE_SINGLE, SINGLE
from aropd_mcore.convert.json_file import CheckpointError, read_json
from aropd_mcore.heartbeat import beat
from aropd_mcore.locks import try_lock

ORDER = "tensors.json"
"""Name of a file among a Megatron checkpoint's HF files: tensor names in the original's order."""

UNTRAINED = "untrained"
"""Name of a folder among a Megatron checkpoint's HF files: tensors that are kept for exports and
are not trained."""

_COMPANION_SUFFIXES = {".json", ".jinja", ".model", ".tiktoken", ".txt"}
_COMPANION_FOLDERS = {"additional_chat_templates"}
_CHECKPOINT_FILES = (
    *(SINGLE, INDEX, PICKLE_SINGLE, PICKLE_INDEX),
    *(".metadata", "latest_checkpointed_iteration.txt"),
)
_SLACK_BYTES = 64 * 2**20
"""Reserve for small files besides the tensors: tokenizer, headers, metadata."""


@contextmanager
def new_folder(
    target: Path,
    *,
    num_bytes: int = 0,
    overwrite: bool = False,
    keep: tuple[Path, ...] = (),
    durable: bool = True,
) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `target` when the block succeeds.

    The temporary folder is next to the target and, with `durable`, is synced before the rename. An
    exception removes it. After a kill, the next call for the same target removes it. With
    `overwrite`, an existing target is kept until the new folder is complete.

    Args:
        num_bytes: size of the files to write. Refused if the disk has less space.
        overwrite: replace an existing target. Only a folder with a checkpoint is replaced.
        keep: folders that are read during the block. They must not be the target or inside it.
        durable: wait until the files are on the disk. Without, they may be lost if the machine
            crashes.
    Raises:
        CheckpointError: the target exists, cannot be created, does not fit on the disk, or another
            process is writing it.
    """
    target = target.resolve()  # if the target is a link, the folder that it points to is replaced
    partial = target.with_name(f".{target.name}.partial")
    replaced = target.with_name(f".{target.name}.replaced")
    refuse_existing(target, overwrite=overwrite, keep=keep)
    _check_space(target, num_bytes, leftover=partial)
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be created: {error.strerror}") from error
    with _only_writer(partial, target):
        try:
            _settle(target, replaced)
            refuse_existing(target, overwrite=overwrite, keep=keep)
            _empty(partial)
            yield partial
            if durable:
                _sync_tree(partial)
            refuse_existing(target, overwrite=overwrite, keep=keep)  # the block may take hours
            if target.exists():
                target.rename(replaced)
            partial.rename(target)
            sync(target.parent)
        except OSError as error:
            if error.errno and error.filename is None:
                error.filename = str(target)  # the error of a full disk names no file
            raise
        finally:
            _settle(target, replaced)
            shutil.rmtree(partial, ignore_errors=True)


def refuse_existing(target: Path, *, overwrite: bool = False, keep: tuple[Path, ...] = ()) -> None:
    """Raise CheckpointError if `target` exists and must not be replaced."""
    for path in keep:
        if path.resolve().is_relative_to(target.resolve()):
            raise CheckpointError(f"{target}: contains the input {path}; choose another folder")
    if not target.exists():
        return
    if not overwrite:
        raise CheckpointError(
            f"{target}: exists already; choose another folder, or replace it with --overwrite"
        )
    is_checkpoint = any((target / name).exists() for name in _CHECKPOINT_FILES)
    if not is_checkpoint and any(target.iterdir() if target.is_dir() else [target]):
        raise CheckpointError(
            f"{target}: is not a checkpoint, so --overwrite does not replace it; choose another "
            "folder"
        )


def copy_companions(source: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """Copy the files that belong to weights: configs, tokenizer, chat template, license.

    The copy of config.json has no `quantization_config`, since quantized weights are dequantized
    when they are read.

    Args:
        dtype: dtype to write into config.json, in which transformers loads the weights. None: keep
            the dtype of config.json.
    """
    for name in companions(source):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
    config = read_json(source / "config.json")
    keys = [key for key in ("dtype", "torch_dtype") if key in config]  # transformers 5, 4
    stated = dict.fromkeys(keys or ["dtype"], str(dtype).removeprefix("torch."))
    changed = dtype is not None and any(config.get(key) != name for key, name in stated.items())
    if changed or "quantization_config" in config:
        config = config | (stated if changed else {})
        config.pop("quantization_config", None)
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def companions(folder: Path) -> list[str]:
    """Return the names of the files of an HF folder that belong to its weights.

    An index of weights and an adapter are left out, since they apply to the original files only.
    """
    names = []
    for path in sorted(folder.iterdir()):
        is_license = path.name.upper().startswith(("LICENSE", "NOTICE"))
        is_of_weights = path.name in (ORDER, *ADAPTER_FILES) or path.name.endswith(".index.json")
        if path.is_dir() and path.name in _COMPANION_FOLDERS:
            inner = sorted(file for file in path.rglob("*") if file.is_file())
            names += [str(file.relative_to(folder)) for file in inner]
        elif path.is_file() and (is_license or path.suffix in _COMPANION_SUFFIXES):
            names += [] if is_of_weights else [path.name]
    return names


def _settle(target: Path, replaced: Path) -> None:
    """End a replacement: remove the old folder if the new one is in place, otherwise restore it."""
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
    elif replaced.exists():
        replaced.rename(target)


def _check_space(target: Path, num_bytes: int, *, leftover: Path) -> None:
    folder = next(path for path in target.parents if path.exists())
    freed = sum(path.lstat().st_blocks * 512 for path in leftover.rglob("*"))
    needed, free = num_bytes + _SLACK_BYTES, shutil.disk_usage(folder).free + freed
    if num_bytes and needed > free:
        raise CheckpointError(
            f"{target}: needs {needed / 1e9:.2f} GB, but {folder} has {free / 1e9:.2f} GB free"
        )


@contextmanager
def _only_writer(partial: Path, target: Path) -> Iterator[None]:
    """Hold a lock on the temporary folder. The lock ends with the process, even after a kill."""
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        if not try_lock(descriptor):
            raise CheckpointError(f"{target}: another process is writing this folder")
        if not partial.exists() or not os.path.samestat(os.fstat(descriptor), partial.stat()):
            raise CheckpointError(f"{target}: another process has just written this folder")
        yield
    finally:
        os.close(descriptor)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _sync_tree(folder: Path) -> None:
    for parent, _, files in os.walk(folder):
        for path in (*files, "."):
            sync(Path(parent, path))
            beat()  # a slow disk may need minutes for a file


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
