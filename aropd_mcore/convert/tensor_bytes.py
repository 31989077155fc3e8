"""Tensors as bytes of a file: dtype and shape, and fast reading and writing."""

import io
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from aropd_mcore.convert.json_file import CheckpointError

MAX_FILE_BYTES = 5_000_000_000
"""Maximum size of a checkpoint's file, unless a single tensor is larger."""
BUCKET_BYTES = 512 * 2**20
"""Number of bytes of tensors that are gathered or sent at once."""
WRITE_BYTES = 2**18
"""Number of bytes per write call. Calls of 50 MB reached a third of the speed (Linux 6, ext4)."""


@dataclass(frozen=True)
class TensorInfo:
    """Dtype and shape of a tensor, which are known without reading it."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Buffer:
    """Reusable memory, which grows to the size of the largest requested tensor.

    Reading into a buffer was measured to be four times as fast as reading into new memory, whose
    pages the kernel must allocate and clear (Linux 6).
    """

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def take(self, sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
        num_bytes = math.prod(sizes) * dtype.itemsize
        if num_bytes > len(self._bytes):
            self._bytes = torch.empty(num_bytes, dtype=torch.uint8)
        return self._bytes[:num_bytes].view(dtype).view(tuple(sizes))


def read_into(file: io.FileIO, tensor: Tensor) -> None:
    """Fill a contiguous tensor from the file's current position."""
    buffer = tensor.view(-1).view(torch.uint8).numpy().data
    while buffer:
        count = file.readinto(buffer)
        if not count:
            raise CheckpointError(f"{file.name}: ends within a tensor")
        buffer = buffer[count:]


def write_at(path: Path, data: memoryview, start: int) -> None:
    """Write into an existing file, from byte `start`."""
    with path.open("r+b", buffering=0) as file:
        while data:
            written = os.pwrite(file.fileno(), data[:WRITE_BYTES], start)
            data, start = data[written:], start + written


def brief_error(error: Exception) -> str:
    """Return an error in one line. For a pickle that torch refuses, name only the refused call."""
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused:
        return f"the file calls {refused[1]}, which is not run"
    return str(error).strip().partition("\n")[0] or type(error).__name__
