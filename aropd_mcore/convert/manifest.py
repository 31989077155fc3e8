"""Manifests of a run's checkpoints: the list of files, which is written last.

    checkpoints/
        iter_0000010/manifest.json    sizes and checksums of the folder's files, and a checksum of
                                      the manifest
        iter_0000020.corrupt/         renamed, since a file did not match the manifest
        .iter_0000030.9f3c.partial/   being written, or left over from a killed process

A folder is renamed to its final name when all of its files are on the disk.
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
    """Size and checksum of a file."""

    size: int
    crc32: int
    """Checksum against accidental damage: the fastest in Python's standard library. It does not
    detect deliberate changes."""


def folder_name(step: int) -> str:
    """Return the folder name of the checkpoint after `step` steps."""
    return f"iter_{step:07d}"


def parse_step(path: Path) -> int:
    """Return the number of training steps of the checkpoint at `path`, from its folder name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path}: expected a folder named iter_NNNNNNN")
    return int(match[1])


def iterations(folder: Path) -> list[Path]:
    """List the checkpoint folders under `folder`, complete or not, newest first."""
    paths = [path for path in folder.glob("iter_*") if _NAME.fullmatch(path.name)]
    return sorted(paths, key=parse_step, reverse=True)


def newest(folder: Path) -> Path | None:
    """Return the newest checkpoint under `folder` with a valid manifest, or None.

    The checkpoint's other files are not checked; see `problems`.
    """
    return next((path for path in iterations(folder) if _has_manifest(path)), None)


def _has_manifest(path: Path) -> bool:
    try:
        read_manifest(path)
    except CheckpointError:
        return False
    return True


def file_sums(folder: Path, names: Iterable[str]) -> dict[str, FileSum]:
    """Compute sizes and checksums of files of a folder, several files at a time.

    Raises:
        OSError: a file cannot be read.
    """
    names = list(names)
    with ThreadPoolExecutor(_THREADS) as pool:  # zlib releases the GIL
        return dict(zip(names, pool.map(lambda name: _file_sum(folder / name), names), strict=True))


def _file_sum(path: Path) -> FileSum:
    size = crc = 0
    # An anonymous mapping instead of a bytearray: malloc has one arena per thread, up to 8 per
    # core, and each arena keeps freed memory. With a bytearray, rank 0 grew by 8 MiB per arena,
    # 120 MiB in its first 16 saves on 2 cores.
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
    """Write the manifest of a folder, and wait until it is on the disk.

    Args:
        about: additional JSON values for readers without Megatron.
    """
    sums = {name: {"size": s.size, "crc32": f"{s.crc32:08x}"} for name, s in sorted(files.items())}
    content = {"format": FORMAT, "step": step, **about, "files": sums}
    text = json.dumps({"crc32": _content_crc(content), "content": content}, indent=1)
    with (folder / MANIFEST).open("w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest: `step`, `files`, and the `about` values of `write_manifest`.

    Raises:
        CheckpointError: the manifest is missing or damaged.
    """
    path = folder / MANIFEST
    try:
        whole = json.loads(path.read_bytes())
        content = whole["content"]
        is_valid = whole["crc32"] == _content_crc(content) and isinstance(content["files"], dict)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing, so the checkpoint is incomplete") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a valid manifest: {error}") from error
    if not is_valid:
        raise CheckpointError(f"{path}: not a valid manifest: its checksum is wrong")
    if content["format"] != FORMAT:
        raise CheckpointError(f"{path}: found format {content['format']}, expected {FORMAT}")
    return content


def _content_crc(content: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


def problems(
    folder: Path, share: int = 0, num_shares: int = 1, *, with_sums: bool = True
) -> list[str]:
    """List the files that do not match the manifest, one line per file. Empty if all match.

    Args:
        share: index of the share of files to read, out of num_shares. Only share 0 reports missing
            files, wrong sizes and a damaged manifest.
        with_sums: read the files and compare checksums. Otherwise only sizes are compared.
    """
    try:
        expected = {
            name: FileSum(entry["size"], int(entry["crc32"], 16))
            for name, entry in read_manifest(folder)["files"].items()
        }
    except CheckpointError as error:
        return [str(error)] if share == 0 else []
    lines = []
    readable = []
    for name, file in expected.items():
        path = folder / name
        try:
            size = path.stat().st_size
        except OSError as error:
            lines.append(f"{path}: {error.strerror}")
            continue
        if size == file.size:
            readable.append(name)
        else:
            lines.append(f"{path}: has {size} bytes, expected {file.size}")
    lines = lines if share == 0 else []
    # Largest files first, so that the shares have similar sizes.
    readable.sort(key=lambda name: (-expected[name].size, name))
    try:
        sums = file_sums(folder, readable[share::num_shares] if with_sums else [])
    except OSError as error:
        return [*lines, f"{error.filename or folder}: cannot be read: {error.strerror}"]
    return lines + [
        f"{folder / name}: has checksum {s.crc32:08x}, expected {expected[name].crc32:08x}"
        for name, s in sums.items()
        if s != expected[name]
    ]
