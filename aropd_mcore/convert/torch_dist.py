"""Reading of Megatron's `torch_dist` checkpoints, without a process group or a GPU.

    .metadata        pickle of each global tensor's dtype, shape and chunks, and each chunk's place
    __0_0.distcp     chunks and objects in the format of torch.save, concatenated
    common.pt        state that all ranks share; megatron-core 0.19 stores it as an object instead
    metadata.json    names of these formats

Global tensors belong to the whole model, independent of the layout that wrote them. The layout that
loads them may need other chunks. The formats are those of torch.distributed.checkpoint and
megatron.core.dist_checkpointing (0.16.1, strategies/torch.py).
"""

import io
import math
import mmap
import pickle
import struct
import threading
import zipfile
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from itertools import product
from pathlib import Path, PosixPath
from types import SimpleNamespace
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from aropd_mcore.convert.architecture import CheckpointError
from aropd_mcore.convert.tensor_bytes import Buffer, TensorInfo, brief_error, read_into

METADATA = ".metadata"
COMMON = "common.pt"
_COMMON_OBJECT = "common_state/shard_0_1"
Index = tuple[int, ...]


class TorchDistReader:
    """The tensors of a checkpoint. Opening it reads the metadata only."""

    def __init__(self, folder: Path):
        """
        Raises:
            CheckpointError: no such checkpoint, another format, or a missing or truncated file.
        """
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        """Dtypes and shapes of global tensors, by key."""
        self._chunks: dict[str, list[ChunkStorageMetadata]] = {}
        self.objects: set[str] = set()
        """Keys of objects that are not tensors."""
        self._places: dict[MetadataIndex, Any] = {}
        try:
            self._read_metadata()
            self._check_files()
        except CheckpointError:
            raise
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be read: {error}") from error
        except Exception as error:  # a truncated or foreign pickle can raise any error
            reason = f"not the metadata of a checkpoint: {brief_error(error)}"
            raise CheckpointError(f"{folder / METADATA}: {reason}") from error
        self._by_lead: dict[tuple[str, int], dict[Index, list[ChunkStorageMetadata]]] = {}
        self._buffers = _Buffers()

    def read(self, key: str, lead: Index, start: Index, sizes: Index) -> Tensor:
        """Read a box of a global tensor.

        Args:
            lead: indices on the leading axes.
            start: first index on each of the other axes.
            sizes: size on each of the other axes.
        Returns:
            A tensor of shape `sizes`, in memory that the next call in this thread reuses.
        Raises:
            CheckpointError: the chunks do not cover the box, or a chunk cannot be read.
        """
        origin, shape = (*lead, *start), (*[1] * len(lead), *sizes)
        out = self._buffers.box.take(shape, self.tensors[key].dtype)
        missing = out.numel()
        for chunk in self._chunks_at(key, lead):
            starts = [max(a, b) for a, b in zip(origin, chunk.offsets, strict=True)]
            ends = [
                min(a + b, c + d)
                for a, b, c, d in zip(origin, shape, chunk.offsets, chunk.sizes, strict=True)
            ]
            if any(s >= e for s, e in zip(starts, ends, strict=True)):
                continue
            target = out[_box(starts, ends, origin)]
            missing -= target.numel()
            self._read_part(key, chunk, starts, target)
        if missing:
            raise CheckpointError(
                f"{self.folder}: {key} is incomplete: {missing} of {out.numel()} elements at "
                f"{list(origin)} are in no chunk"
            )
        return out.view(sizes)

    def read_common(self) -> dict[str, Any]:
        """Read the state that all ranks share. Empty if it contains unknown classes."""
        try:
            with torch.serialization.safe_globals([Namespace, SimpleNamespace, PosixPath]):
                if _COMMON_OBJECT in self.objects:
                    with self._opened(MetadataIndex(_COMMON_OBJECT)) as (_, mapped, start):
                        return _load(mapped, start)[0]
                return torch.load(self.folder / COMMON, map_location="cpu", weights_only=True)
        except Exception:  # any error, as in _opened
            return {}

    def _chunks_at(self, key: str, lead: Index) -> list[ChunkStorageMetadata]:
        if (key, len(lead)) not in self._by_lead:  # models with experts have tens of thousands
            by_lead = defaultdict[Index, list[ChunkStorageMetadata]](list)
            for chunk in self._chunks[key]:
                spans = zip(chunk.offsets[: len(lead)], chunk.sizes, strict=False)
                for place in product(*(range(first, first + size) for first, size in spans)):
                    by_lead[place].append(chunk)
            self._by_lead[key, len(lead)] = by_lead
        return self._by_lead[key, len(lead)][lead]

    def _read_part(
        self, key: str, chunk: ChunkStorageMetadata, starts: Sequence[int], target: Tensor
    ) -> None:
        """Read the part of a chunk that starts at `starts` into `target`, which has its shape.

        Only the bytes from the part's first to its last element are read.
        """
        strides = torch.empty(chunk.sizes, device="meta").stride()
        lasts = [size - 1 for size in target.shape]
        first = _dot(strides, [s - o for s, o in zip(starts, chunk.offsets, strict=True)])
        span = 1 + _dot(strides, lasts)
        index = MetadataIndex(key, chunk.offsets)
        if span == target.numel() and target.is_contiguous():
            self._read_elements(index, chunk.sizes, first, target.view(-1))
            return
        elements = self._buffers.chunk.take((span,), target.dtype)
        self._read_elements(index, chunk.sizes, first, elements)
        target.copy_(elements.as_strided(target.shape, strides))

    def _read_elements(
        self, index: MetadataIndex, sizes: Sequence[int], first: int, into: Tensor
    ) -> None:
        """Read elements from number `first` on of a chunk in torch.save's format.

        Args:
            sizes: shape of the chunk.
            into: 1-D and contiguous.
        """
        with self._opened(index) as (file, mapped, start):
            data = _data_start(mapped, into.dtype, math.prod(sizes))
            if data is None:
                elements = _load(mapped, start).reshape(tuple(sizes)).reshape(-1)
                into.copy_(elements[first : first + len(into)])
                return
            file.seek(self._places[index].offset - start + data + first * into.itemsize)
            read_into(file, into)

    @contextmanager
    def _opened(self, index: MetadataIndex) -> Iterator[tuple[io.FileIO, mmap.mmap, int]]:
        """Open the file of a chunk or object. Yields the file, a mapping, and the start in it."""
        place = self._places.get(index)
        if place is None:
            raise CheckpointError(f"{self.folder / METADATA}: has no entry for {index.fqn}")
        path = self.folder / place.relative_path
        if getattr(place, "transform_descriptors", None):
            raise CheckpointError(f"{path}: {index.fqn} is compressed, which is not supported")
        start = place.offset % mmap.ALLOCATIONGRANULARITY
        size, offset = start + place.length, place.offset - start
        try:
            with (
                path.open("rb", buffering=0) as file,
                mmap.mmap(file.fileno(), size, offset=offset, access=mmap.ACCESS_READ) as mapped,
            ):
                yield file, mapped, start
        except Exception as error:  # for damaged bytes, zipfile, pickle and torch raise any error
            reason = brief_error(error)
            raise CheckpointError(f"{path}: {index.fqn} cannot be read: {reason}") from error

    def _read_metadata(self) -> None:
        content = _MetadataUnpickler(io.BytesIO((self.folder / METADATA).read_bytes())).load()
        if not isinstance(content, Metadata):
            raise ValueError(f"it holds {type(content).__name__}")
        self._places = content.storage_data or {}
        for key, entry in content.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                self.objects.add(key)
                continue
            for chunk in entry.chunks:
                spans = zip(chunk.offsets, chunk.sizes, entry.size, strict=True)
                if not all(0 <= offset <= offset + size <= whole for offset, size, whole in spans):
                    raise ValueError(f"{key} has a chunk outside of its bounds")
            self.tensors[key] = TensorInfo(entry.properties.dtype, tuple(entry.size))
            self._chunks[key] = entry.chunks

    def _check_files(self) -> None:
        """Check that every file is as long as the metadata require."""
        ends: dict[str, int] = {}
        for place in self._places.values():
            end = place.offset + place.length
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), end)
        for name, end in ends.items():
            path = self.folder / name
            if Path(name).name != name:
                raise CheckpointError(
                    f"{self.folder / METADATA}: names {name!r}, outside the folder"
                )
            size = path.stat().st_size if path.exists() else None
            if size is None or size < end:
                state = "is missing" if size is None else f"has {size} bytes"
                raise CheckpointError(f"{path}: {state}; {METADATA} requires {end} bytes")


class _Buffers(threading.local):
    """Buffers of one thread."""

    def __init__(self) -> None:
        self.box, self.chunk = Buffer(), Buffer()


def _load(mapped: mmap.mmap, start: int) -> Any:
    return torch.load(io.BytesIO(mapped[start:]), map_location="cpu", weights_only=True)


def _data_start(mapped: mmap.mmap, dtype: torch.dtype, num_elements: int) -> int | None:
    """Return the start of a saved tensor's data in the mapping. None if they are no plain block.

    A plain block has num_elements elements of this dtype, contiguous and in row-major order.
    """
    with zipfile.ZipFile(cast(BinaryIO, mapped)) as archive:  # other bytes may precede a zip file
        records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    pickled = records["data.pkl"]
    start = _record_start(mapped, pickled)
    try:
        record = _TensorRecord(io.BytesIO(mapped[start : start + pickled.file_size])).load()
    except pickle.UnpicklingError:  # a parameter, a sparse tensor, or not a tensor
        return None
    (_, storage, key, _, numel), offset, sizes, strides, *_ = record
    plain = strides == torch.empty(sizes, device="meta").stride() and not offset
    same = storage == torch.storage._dtype_to_storage_type_map()[dtype]
    if not plain or not same or not numel == math.prod(sizes) == num_elements > 0:
        return None
    return _record_start(mapped, records[f"data/{key}"])


def _record_start(mapped: mmap.mmap, record: zipfile.ZipInfo) -> int:
    """Return the start of an uncompressed zip record's bytes, which follow its local header."""
    name_length, extra_length = struct.unpack_from("<26xHH", mapped, record.header_offset)
    return record.header_offset + 30 + name_length + extra_length


class _TensorRecord(pickle.Unpickler):
    """Unpickler of one tensor's record in torch.save: its storage, offset, sizes and strides."""

    def persistent_load(self, pid: Any) -> Any:
        return pid

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *record: record
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name.endswith("Storage"):
            return name
        raise pickle.UnpicklingError(f"found {module}.{name}, expected a tensor")


def _dot(strides: Sequence[int], places: Sequence[int]) -> int:
    return sum(stride * place for stride, place in zip(strides, places, strict=True))


def _box(starts: Sequence[int], ends: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(s - o, e - o) for s, e, o in zip(starts, ends, origin, strict=True))


_METADATA_CLASSES = {
    (module.__name__, name): getattr(module, name)
    for module, names in {
        metadata: (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        ),
        planner: ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
        filesystem: ("_StorageInfo",),
    }.items()
    for name in names
} | {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("pathlib", "PosixPath"): PosixPath,
    ("pathlib._local", "PosixPath"): PosixPath,  # Python 3.13
}


def _member(of: type[Enum], name: str) -> Enum:
    if not issubclass(of, Enum):
        raise pickle.UnpicklingError(f"builtins.getattr of {of} is not allowed in metadata")
    return of[name]


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickler that allows only the classes of checkpoint metadata, and runs no other code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _METADATA_CLASSES:
            return _METADATA_CLASSES[module, name]
        if (module, name) == ("builtins", "getattr"):  # for enums in Python 3.11.0 to 3.11.3
            return _member
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name in ("MCoreMetadata", "MCoreSavePlan"):  # subclasses that megatron-core 0.15 wrote
            return {"MCoreMetadata": Metadata, "MCoreSavePlan": planner.SavePlan}[name]
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in metadata")
