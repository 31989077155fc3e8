"""Megatron's `torch_dist` checkpoints written; torch_dist.py says what they are made of."""

import io
import json
import os
import pickle
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from aropd_mcore.convert.tensor_bytes import MAX_FILE_BYTES, WRITE_BYTES, TensorInfo
from aropd_mcore.convert.torch_dist import COMMON, METADATA, Index

_ALIGNMENT = 64  # as within torch.save's files
_FORMATS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class TorchDistWriter:
    """Writes a checkpoint chunk by chunk, from several threads; each writes files of its own."""

    def __init__(self, folder: Path, *, max_file_bytes: int = MAX_FILE_BYTES):
        """
        Args:
            folder: exists and is empty.
            max_file_bytes: a thread begins a new file when one has reached this size.
        """
        self._folder = folder
        self._max_file_bytes = max_file_bytes
        self._files: dict[int, list[io.FileIO]] = {}
        self._entries: dict[str, Any] = {}
        self._places: dict[MetadataIndex, Any] = {}
        self._lock = threading.Lock()

    def add(self, key: str, info: TensorInfo, offset: Index, chunk: Tensor) -> None:
        """Write the part of a global tensor that starts at `offset`.

        Args:
            info: of the whole tensor, the same for all its chunks.
            chunk: may be a part of a larger tensor; leading axes of size 1 may be left out.
        """
        sizes = torch.Size((1,) * (len(offset) - chunk.dim()) + tuple(chunk.shape))
        new = TensorStorageMetadata(TensorProperties(info.dtype), torch.Size(info.shape), chunks=[])
        with self._lock:
            entry = self._entries.setdefault(key, new)
        assert chunk.dtype == info.dtype, (key, chunk.dtype, info.dtype)
        entry.chunks.append(ChunkStorageMetadata(torch.Size(offset), sizes))
        # torch.save writes the whole memory that a tensor is a part of; this has its own alone.
        own = torch.from_numpy(chunk.contiguous().view(-1).view(torch.uint8).numpy())
        self._append(MetadataIndex(key, torch.Size(offset)), own.view(chunk.dtype).view(sizes))

    def add_object(self, key: str, value: object) -> None:
        """Write one of Megatron's sharded objects."""
        self._entries[key] = BytesStorageMetadata()
        self._append(MetadataIndex(key), [value])

    def finish(self, common: Mapping[str, Any]) -> None:
        """Write what makes the folder a checkpoint."""
        for entry in self._entries.values():
            if isinstance(entry, TensorStorageMetadata):  # the same, whichever thread was first
                entry.chunks.sort(key=lambda chunk: tuple(chunk.offsets))
        torch.save(dict(common), self._folder / COMMON)
        (self._folder / "metadata.json").write_text(json.dumps(_FORMATS))
        with open(self._folder / METADATA, "wb") as file:
            pickle.dump(Metadata(self._entries, storage_data=self._places), file)

    def __enter__(self) -> Self:
        # The checksums of the zip format cost torch.save two thirds of its speed, and nothing that
        # reads a checkpoint looks at them.
        self._crc32 = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        return self

    def __exit__(self, *_: object) -> None:
        torch.serialization.set_crc32_options(self._crc32)
        for files in self._files.values():
            files[-1].close()

    def _file(self) -> io.FileIO:
        """This thread's, where the next chunk or object goes."""
        with self._lock:
            files = self._files.setdefault(threading.get_ident(), [])
            number = list(self._files).index(threading.get_ident())
        if files and files[-1].tell() >= self._max_file_bytes:
            files[-1].close()
        if not files or files[-1].closed:
            path = self._folder / f"__{number}_{len(files)}.distcp"
            files.append(path.open("wb", buffering=0))
        return files[-1]

    def _append(self, index: MetadataIndex, value: object) -> None:
        file = self._file()
        start = file.seek(-file.tell() % _ALIGNMENT, os.SEEK_CUR)
        pieces = _InPieces(file)
        try:
            torch.save(value, cast(BinaryIO, pieces))
        except RuntimeError as error:  # torch's, about what a full disk or a signal has left
            raise pieces.error or error.__context__ or error from None
        place = filesystem._StorageInfo(Path(str(file.name)).name, start, file.tell() - start)
        self._places[index] = place


class _InPieces:
    """A file for torch.save, which writes a tensor in one call; see WRITE_BYTES."""

    def __init__(self, file: io.FileIO):
        self._file = file
        self.flush = file.flush
        self.error: BaseException | None = None
        """What stopped a write; torch puts an error of its own in its place."""

    def write(self, data: bytes) -> int:
        left = memoryview(data)
        try:
            while left:
                left = left[self._file.write(left[:WRITE_BYTES]) :]
        except BaseException as error:
            self.error = error
            raise
        return len(data)
