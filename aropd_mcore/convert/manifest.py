"""A run's checkpoints by their manifests: the list of files, written last, that makes one whole.

    checkpoints/
        iter_0000010/manifest.json    sizes and checksums of the folder's other files, and of itself
        iter_0000020.corrupt/         set aside, since a file was not what its manifest says
        .iter_0000030.9f3c.partial/   being written, or left behind by a kill

The folder's name appears by a rename when everything in it is on the disk.
"""

import json
import mmap
import os
import re
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from aropd_mcore.convert.architecture import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 1
_NAME = re.compile(r"iter_(\d{7,})")
_CHUNK_BYTES = 8 * 2**20
_THREADS = 4


class FileSum(NamedTuple):
    """What a file has to be."""

    size: int
    crc32: int
    """Against accidents, which it is the fastest for of what Python comes with; a file that was
    changed on purpose is not its business."""


def folder_name(step: int) -> str:
    """Of the checkpoint of so many steps."""
    return f"iter_{step:07d}"


def step_of(path: Path) -> int:
    """Number of training steps that the checkpoint at `path` has seen."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path}: expected a folder named iter_NNNNNNN")
    return int(match[1])


def iterations(folder: Path) -> list[Path]:
    """What has the name of a checkpoint under `folder`, whole or not, newest first."""
    found = [path for path in folder.glob("iter_*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def newest(folder: Path) -> Path | None:
    """The newest checkpoint under `folder` whose manifest is whole, or None.

    Its other files are not looked at: that is `problems`' work.
    """
    return next((path for path in iterations(folder) if _has_manifest(path)), None)


def _has_manifest(path: Path) -> bool:
    try:
        read_manifest(path)
    except CheckpointError:
        return False
    return True


def file_sums(folder: Path, names: Iterable[str]) -> dict[str, FileSum]:
    """The sums of files of a folder, several at a time.

    Raises:
        OSError: one cannot be read.
    """
    names = list(names)
    with ThreadPoolExecutor(_THREADS) as pool:  # zlib lets go of the interpreter
        return dict(zip(names, pool.map(lambda name: _file_sum(folder / name), names), strict=True))


def _file_sum(path: Path) -> FileSum:
    size = crc = 0
    # No bytearray: malloc has an arena a thread, up to 8 a core, that keeps what was freed in it.
    # The first rank grew by these 8 MiB in each, 120 MiB in its first 16 saves on 2 cores.
    with (
        path.open("rb", buffering=0) as file,
        mmap.mmap(-1, _CHUNK_BYTES, flags=mmap.MAP_PRIVATE) as memory,
        memoryview(memory) as buffer,
    ):
        while num_bytes := file.readinto(buffer):
            crc = zlib.crc32(buffer[:num_bytes], crc)
            size += num_bytes
    return FileSum(size, crc)


def write_manifest(
    folder: Path, step: int, files: Mapping[str, FileSum], about: Mapping[str, Any]
) -> None:
    """Write the manifest of a folder, and wait until the disk has it.

    Args:
        about: more that a reader may want to know without Megatron; JSON values.
    """
    sums = {name: {"size": s.size, "crc32": f"{s.crc32:08x}"} for name, s in sorted(files.items())}
    content = {"format": FORMAT, "step": step, **about, "files": sums}
    text = json.dumps({"crc32": _crc_of(content), "content": content}, indent=1)
    with (folder / MANIFEST).open("w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint's manifest: `step`, `files`, and what else `write_manifest` got.

    Raises:
        CheckpointError: there is none, or it is not whole.
    """
    path = folder / MANIFEST
    try:
        whole = json.loads(path.read_bytes())
        content = whole["content"]
        is_whole = whole["crc32"] == _crc_of(content) and isinstance(content["files"], dict)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing, so the checkpoint is not whole") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a whole manifest: {error}") from error
    if not is_whole:
        raise CheckpointError(f"{path}: not a whole manifest: its checksum is not its content's")
    if content["format"] != FORMAT:
        raise CheckpointError(f"{path}: found format {content['format']}, expected {FORMAT}")
    return content


def _crc_of(content: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


def problems(
    folder: Path, share: int = 0, num_shares: int = 1, *, with_sums: bool = True
) -> list[str]:
    """What is not as the manifest says, a line a file; empty if all is well.

    Args:
        share: which of num_shares shares of the files to read; missing files and wrong sizes, and
            a manifest that is not whole, are share 0's.
        with_sums: read the files; else their sizes alone are compared.
    """
    try:
        expected = {
            name: FileSum(found["size"], int(found["crc32"], 16))
            for name, found in read_manifest(folder)["files"].items()
        }
    except CheckpointError as error:
        return [str(error)] if share == 0 else []
    found = []
    readable = []
    for name, file in expected.items():
        path = folder / name
        try:
            size = path.stat().st_size
        except OSError as error:
            found.append(f"{path}: {error.strerror}")
            continue
        if size == file.size:
            readable.append(name)
        else:
            found.append(f"{path}: has {size} bytes, expected {file.size}")
    found = found if share == 0 else []
    # The largest first, so that the shares come out alike.
    readable.sort(key=lambda name: (-expected[name].size, name))
    try:
        sums = file_sums(folder, readable[share::num_shares] if with_sums else [])
    except OSError as error:
        return [*found, f"{error.filename or folder}: cannot be read: {error.strerror}"]
    return found + [
        f"{folder / name}: has checksum {s.crc32:08x}, expected {expected[name].crc32:08x}"
        for name, s in sums.items()
        if s != expected[name]
    ]
