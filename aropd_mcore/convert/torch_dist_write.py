"""Writing of Megatron's `torch_dist` checkpoints. torch_dist.py describes their files."""

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
    """Writer of a checkpoint, chunk by chunk. Several threads may write, each to separate files."""

    def __init__(self, folder: Path, *, max_file_bytes: int = MAX_FILE_BYTES):
        """
        Args:
            folder: an existing empty folder.
            max_file_bytes: size at which a thread begins a new file.
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
            info: dtype and shape of the whole tensor, equal for all of its chunks.
            chunk: data of the part. Leading axes of size 1 may be omitted.
        """
        sizes = torch.Size((1,) * (len(offset) - chunk.dim()) + tuple(chunk.shape))
        new = TensorStorageMetadata(TensorProperties(info.dtype), torch.Size(info.shape), chunks=[])
        with self._lock:
            entry = self._entries.setdefault(key, new)
        assert chunk.dtype == info.dtype, (key, chunk.dtype, info.dtype)
        entry.chunks.append(ChunkStorageMetadata(torch.Size(offset), sizes))
        # torch.save writes the whole storage of a tensor, so use a storage without other data.
        own = torch.from_numpy(chunk.contiguous().view(-1).view(torch.uint8).numpy())
        self._append(MetadataIndex(key, torch.Size(offset)), own.view(chunk.dtype).view(sizes))

    def add_object(self, key: str, value: object) -> None:
        """Write one of Megatron's sharded objects."""
        self._entries[key] = BytesStorageMetadata()
        self._append(MetadataIndex(key), [value])

    def finish(self, common: Mapping[str, Any]) -> None:
        """Write the common state and the metadata, which complete the checkpoint."""
        for entry in self._entries.values():
            if isinstance(entry, TensorStorageMetadata):  # independent of the threads' order
                entry.chunks.sort(key=lambda chunk: tuple(chunk.offsets))
        torch.save(dict(common), self._folder / COMMON)
        (self._folder / "metadata.json").write_text(json.dumps(_FORMATS))
        with open(self._folder / METADATA, "wb") as file:
            pickle.dump(Metadata(self._entries, storage_data=self._places), file)

    def __enter__(self) -> Self:
        # The checksums of the zip format cost torch.save two thirds of its speed, and no reader of
        # a checkpoint checks them.
        self._crc32 = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        return self

    def __exit__(self, *_: object) -> None:
        torch.serialization.set_crc32_options(self._crc32)
        for files in self._files.values():
            files[-1].close()

    def _file(self) -> io.FileIO:
        """Return this thread's file for the next chunk or object."""
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
        except RuntimeError as error:  # raised by torch after a full disk or a signal
            raise pieces.error or error.__context__ or error from None
        place = filesystem._StorageInfo(Path(str(file.name)).name, start, file.tell() - start)
        self._places[index] = place


class _InPieces:
    """A file for torch.save that splits large writes into calls of WRITE_BYTES."""

    def __init__(self, file: io.FileIO):
        self._file = file
        self.flush = file.flush
        self.error: BaseException | None = None
        """Error that stopped a write. torch raises another error instead."""

    def write(self, data: bytes) -> int:
        left = memoryview(data)
        try:
            while left:
                left = left[self._file.write(left[:WRITE_BYTES]) :]
        except BaseException as error:
            self.error = error
            raise
        return len(data)
