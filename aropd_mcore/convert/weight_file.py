"""One file of weights: safetensors, or a pickle of torch.save.

A safetensors file consists of an 8-byte length, a JSON header (name -> dtype, shape, bytes) and the
bytes. This module maps one tensor at a time. The safetensors library maps whole files, whose pages
count as this process's memory until the last tensor is read.
"""

import json
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from aropd_mcore.convert.json_file import CheckpointError, brief, unique_keys
from aropd_mcore.convert.tensor_bytes import Buffer, TensorInfo, brief_error, read_into

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MALFORMED = (ValueError, LookupError, TypeError, AttributeError, RecursionError)  # JSON


class WeightFile(Protocol):
    infos: dict[str, TensorInfo]

    def read(self, name: str, part: tuple[slice, ...], buffer: Buffer) -> Tensor: ...


class Safetensors:
    """One safetensors file."""

    def __init__(self, path: Path, dtypes: Mapping[str, torch.dtype]):
        self.path = path
        self._dtypes = dtypes
        self.infos: dict[str, TensorInfo] = {}
        self._starts: dict[str, int] = {}
        try:
            self._read_header()
        except CheckpointError:
            raise
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        except MALFORMED as error:
            raise self._broken(repr(error)) from error

    def _read_header(self) -> None:
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise self._broken(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length), object_pairs_hook=unique_keys)
        header.pop("__metadata__", None)
        ends = [8 + length]
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if any(n is True or n is False or n < 0 for n in entry["shape"]):
                raise self._broken(f"{name} has the shape {brief(entry['shape'])}")
            start, end = (8 + length + operator.index(o) for o in entry["data_offsets"])
            if entry["dtype"] not in self._dtypes:
                dtype = entry["dtype"] if isinstance(entry["dtype"], str) else brief(entry["dtype"])
                raise CheckpointError(
                    f"{self.path}: {name} has dtype {dtype}; expected one of "
                    f"{', '.join(DTYPES)} (quantized checkpoints cannot be read)"
                )
            shape = tuple(operator.index(n) for n in entry["shape"])
            info = TensorInfo(self._dtypes[entry["dtype"]], shape)
            if end - start != info.num_bytes:
                raise self._broken(f"{name} has {end - start} bytes for {list(info.shape)}")
            if start != ends[-1]:
                raise self._broken(f"{name} starts at byte {start}, expected {ends[-1]}")
            self.infos[name], self._starts[name] = info, start
            ends.append(end)
        if size != ends[-1]:
            raise self._broken(f"found {size} bytes, expected {ends[-1]} by its header")

    def _broken(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: not a valid safetensors file: {reason}")

    def read(self, name: str, part: tuple[slice, ...], buffer: Buffer) -> Tensor:
        info = self.infos[name]
        if info.shape and info.num_bytes and len(part) < 2:  # whole rows are contiguous
            rows, row_bytes = info.shape[0], info.num_bytes // info.shape[0]
            start, end, _ = (part or (slice(None),))[0].indices(rows)
            out = buffer.take((max(end - start, 0), *info.shape[1:]), info.dtype)
            with self.path.open("rb", buffering=0) as file:
                file.seek(self._starts[name] + start * row_bytes)
                read_into(file, out)
            return out
        if info.num_bytes == 0:
            return torch.empty(info.shape, dtype=info.dtype)[part].clone()
        # The copy releases the mapping, so the pages of at most one tensor are held.
        raw = np.memmap(self.path, mode="c", offset=self._starts[name], shape=(info.num_bytes,))
        whole = torch.from_numpy(raw).view(info.dtype).view(info.shape)
        return whole[part].clone(memory_format=torch.contiguous_format)


class Pickle:
    """One .bin file of torch.save, read as weights only. Each read maps the file again."""

    def __init__(self, path: Path):
        self.path = path
        self.infos: dict[str, TensorInfo] = {}
        tensors = self._load()
        if not isinstance(tensors, dict):
            raise CheckpointError(
                f"{path}: holds {type(tensors).__name__}; expected a dict of tensors"
            )
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor) or tensor.dtype not in _DTYPE_NAMES:
                kind = getattr(tensor, "dtype", type(tensor).__name__)
                raise CheckpointError(
                    f"{path}: {name} is {kind}; expected a tensor of {', '.join(DTYPES)}"
                )
            self.infos[name] = TensorInfo(tensor.dtype, tuple(tensor.shape))

    def read(self, name: str, part: tuple[slice, ...], buffer: Buffer) -> Tensor:
        return self._load()[name][part].clone(memory_format=torch.contiguous_format)

    def _load(self) -> Any:
        try:
            return torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch raises many types of errors
            reason = brief_error(error)
            raise CheckpointError(f"{self.path}: cannot be read as weights: {reason}") from error
