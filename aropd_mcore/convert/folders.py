"""Folders that are written whole or not at all, and the small files that travel with weights."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from aropd_mcore.convert.hf_io import ADAPTER_FILES, INDEX, PICKLE_INDEX, PICKLE_SINGLE, SINGLE
from aropd_mcore.convert.json_file import CheckpointError, read_json
from aropd_mcore.locks import try_lock

ORDER = "tensors.json"
"""Beside a Megatron checkpoint's HF files: the original's tensor names, in its order."""

_COMPANION_SUFFIXES = {".json", ".jinja", ".model", ".tiktoken", ".txt"}
_COMPANION_FOLDERS = {"additional_chat_templates"}
_CHECKPOINT_FILES = (
    *(SINGLE, INDEX, PICKLE_SINGLE, PICKLE_INDEX),
    *(".metadata", "latest_checkpointed_iteration.txt"),
)
_SLACK_BYTES = 64 * 2**20
"""Room for what is small beside the tensors: tokenizer, headers, metadata."""


@contextmanager
def new_folder(
    target: Path, *, num_bytes: int = 0, overwrite: bool = False, keep: tuple[Path, ...] = ()
) -> Iterator[Path]:
    """A folder to fill that takes its name, `target`, only when the block has ended well.

    It is filled under a temporary name beside the target, synced and renamed. An exception removes
    it; a kill leaves it behind, and the next call for the same target removes it. With `overwrite`
    an older target stays until the new one is whole.

    Args:
        num_bytes: that will be written; refused if the disk has less.
        overwrite: replace an existing target; only a folder that holds a checkpoint is replaced.
        keep: folders that are read meanwhile, and must not be the target nor lie in it.
    Raises:
        CheckpointError: the target exists, cannot be made, does not fit, or is being written now.
    """
    target = target.resolve()  # of a link, the folder behind it is replaced
    partial = target.with_name(f".{target.name}.partial")
    replaced = target.with_name(f".{target.name}.replaced")
    refuse_existing(target, overwrite=overwrite, keep=keep)
    _check_space(target, num_bytes, leftover=partial)
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be made: {error.strerror}") from error
    with _only_writer(partial, target):
        try:
            _settle(target, replaced)
            refuse_existing(target, overwrite=overwrite, keep=keep)
            _empty(partial)
            yield partial
            _sync_tree(partial)
            refuse_existing(target, overwrite=overwrite, keep=keep)  # hours may have passed
            if target.exists():
                target.rename(replaced)
            partial.rename(target)
            sync(target.parent)
        except OSError as error:
            if error.errno and error.filename is None:
                error.filename = str(target)  # a full disk does not say where
            raise
        finally:
            _settle(target, replaced)
            shutil.rmtree(partial, ignore_errors=True)


def refuse_existing(target: Path, *, overwrite: bool = False, keep: tuple[Path, ...] = ()) -> None:
    """Raise CheckpointError if there is something at `target` that may not be replaced."""
    for path in keep:
        if path.resolve().is_relative_to(target.resolve()):
            raise CheckpointError(f"{target}: holds what is read, {path}; name another folder")
    if not target.exists():
        return
    if not overwrite:
        raise CheckpointError(
            f"{target}: exists already; name another folder, or replace it with --overwrite"
        )
    is_checkpoint = any((target / name).exists() for name in _CHECKPOINT_FILES)
    if not is_checkpoint and any(target.iterdir() if target.is_dir() else [target]):
        raise CheckpointError(f"{target}: is no checkpoint, so --overwrite does not replace it")


def copy_companions(source: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """Copy the files beside the weights: config, generation config, tokenizer, template, license.

    Args:
        dtype: written into config.json, since transformers loads in it; None leaves it as it is.
    """
    for name in companions(source):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
    config = read_json(source / "config.json")
    keys = [key for key in ("dtype", "torch_dtype") if key in config]  # transformers 5, 4
    stated = dict.fromkeys(keys or ["dtype"], str(dtype).removeprefix("torch."))
    if dtype is not None and any(config.get(key) != name for key, name in stated.items()):
        (target / "config.json").write_text(json.dumps(config | stated, indent=2) + "\n")


def companions(folder: Path) -> list[str]:
    """The files of an HF folder that go with its weights, by their names in the folder.

    An index of weights is none of them, nor is an adapter: both belong to the original's weights.
    """
    found = []
    for path in sorted(folder.iterdir()):
        is_license = path.name.upper().startswith(("LICENSE", "NOTICE"))
        is_of_weights = path.name in (ORDER, *ADAPTER_FILES) or path.name.endswith(".index.json")
        if path.is_dir() and path.name in _COMPANION_FOLDERS:
            inner = sorted(file for file in path.rglob("*") if file.is_file())
            found += [str(file.relative_to(folder)) for file in inner]
        elif path.is_file() and (is_license or path.suffix in _COMPANION_SUFFIXES):
            found += [] if is_of_weights else [path.name]
    return found


def _settle(target: Path, replaced: Path) -> None:
    """End a replacement: the old folder goes, or comes back where nothing took its place."""
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
            f"{target}: needs {needed / 1e9:.2f} GB, and {folder} has {free / 1e9:.2f} GB free"
        )


@contextmanager
def _only_writer(partial: Path, target: Path) -> Iterator[None]:
    """Hold a lock on the temporary folder; it ends with the process, however that ends."""
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        if not try_lock(descriptor):
            raise CheckpointError(f"{target}: another process is writing it")
        if not partial.exists() or not os.path.samestat(os.fstat(descriptor), partial.stat()):
            raise CheckpointError(f"{target}: another process has just written it")
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


def sync(path: Path) -> None:
    """Wait until the disk has a file's bytes, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
