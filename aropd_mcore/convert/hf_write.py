"""Writing of HF folders: safetensors files and their index, tensor by tensor in any order."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from aropd_mcore.convert.hf_io import INDEX, SINGLE
from aropd_mcore.convert.stacked import Element, stack
from aropd_mcore.convert.tensor_bytes import MAX_FILE_BYTES, TensorInfo, write_at
from aropd_mcore.convert.weight_file import DTYPES

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsWriter:
    """Writer of tensors in the layout of transformers: one file, or shards and their index.

    The constructor writes all headers from the tensors' dtypes and shapes. The tensors may then be
    written in any order.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, TensorInfo],
        *,
        elements: Mapping[str, Element] | None = None,
        max_shard_bytes: int = MAX_FILE_BYTES,
    ):
        """
        Args:
            tensors: dtypes and shapes of all tensors, in the order of the files.
            elements: those tensors that are elements of stacked ones. The files have the latter.
            max_shard_bytes: maximum size of a file's tensors. A single tensor may exceed it.
        """
        self._tensors = tensors
        self._elements = elements or {}
        self._places: dict[str, tuple[Path, int]] = {}
        tensors = stack(tensors, self._elements)
        shards = _plan_shards(tensors, max_shard_bytes)
        names = [SINGLE] if len(shards) == 1 else _shard_names(len(shards))
        for file_name, shard in zip(names, shards, strict=True):
            file = folder / file_name
            header, starts = build_header({name: tensors[name] for name in shard})
            file.write_bytes(header)
            self._places |= {name: (file, start) for name, start in starts.items()}
        if len(shards) > 1:
            files = zip(names, shards, strict=True)
            write_index(folder, tensors, {name: file for file, shard in files for name in shard})
        for name, part in self._elements.items():
            file, start = self._places[part.tensor]
            self._places[name] = file, start + part.index * self._tensors[name].num_bytes
        for part in self._elements.values():
            self._places.pop(part.tensor, None)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor of the declared shape, cast to the declared dtype."""
        info = self._tensors[name]
        assert tuple(tensor.shape) == info.shape, (name, tensor.shape, info.shape)
        file, start = self._places.pop(name)
        data = tensor.detach().to("cpu", info.dtype).contiguous()
        if name in self._elements:
            data = self._elements[name].to_file(data)
        # Open the file for each tensor: there may be more shards than a process may hold open.
        write_at(file, data.flatten().view(torch.uint8).numpy().data, start)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        assert error_type or not self._places, f"not written: {list(self._places)[:3]}"


def write_safetensors(
    folder: Path,
    tensors: Mapping[str, TensorInfo],
    stream: Iterable[tuple[str, Tensor]],
    *,
    elements: Mapping[str, Element] | None = None,
    max_shard_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write a stream of tensors, with one tensor in memory at a time; see SafetensorsWriter."""
    with SafetensorsWriter(
        folder, tensors, elements=elements, max_shard_bytes=max_shard_bytes
    ) as writer:
        for name, tensor in stream:
            writer.write(name, tensor)


def write_index(folder: Path, tensors: Mapping[str, TensorInfo], files: Mapping[str, str]) -> None:
    """Write the index of a folder of several files.

    Args:
        files: name of the file of each tensor.
    """
    index = {
        "metadata": {"total_size": sum(info.num_bytes for info in tensors.values())},
        "weight_map": dict(files),
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _plan_shards(tensors: Mapping[str, TensorInfo], limit: int) -> list[list[str]]:
    shards, filled = [[]], 0
    for name, info in tensors.items():
        if shards[-1] and filled + info.num_bytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += info.num_bytes
    return shards


def _shard_names(count: int) -> list[str]:
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def build_header(tensors: Mapping[str, TensorInfo]) -> tuple[bytes, dict[str, int]]:
    """Build the header of a safetensors file, and the start byte of each tensor's data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset, offsets = 0, {}
    for name, info in tensors.items():
        offsets[name], end = offset, offset + info.num_bytes
        header[name] = {
            "dtype": _DTYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format's alignment
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: start + o for name, o in offsets.items()}
