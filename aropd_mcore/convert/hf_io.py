"""Reading of HF folders, one tensor or part of a tensor at a time.

Opening a folder reads the headers only. A safetensors file consists of an 8-byte length, a JSON
header (name -> dtype, shape, bytes) and the bytes. This module maps one tensor at a time. The
safetensors library maps whole files, whose pages count as this process's memory until the last
tensor is read.
"""

import json
import operator
import os
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from aropd_mcore.convert.architecture import Architecture
from aropd_mcore.convert.json_file import CheckpointError, brief, unique_keys
from aropd_mcore.convert.mapping import EMBEDDING, HEAD, IGNORED_HF_TENSORS
from aropd_mcore.convert.mxfp4 import packed_shapes
from aropd_mcore.convert.tensor_bytes import Buffer, TensorInfo, brief_error, read_into

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLE_INDEX = "pytorch_model.bin.index.json"
PICKLE_SINGLE = "pytorch_model.bin"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PACKED = {"U8": torch.uint8}  # bytes of quantized weights
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_MALFORMED = (ValueError, LookupError, TypeError, AttributeError, RecursionError)  # JSON
_IGNORED = re.compile(IGNORED_HF_TENSORS)
_PIECE = 2**22  # number of elements of a tensor that are compared at a time
_QUANTIZED = (".qweight", ".qzeros", ".scales", ".g_idx", ".weight_scale", ".weight_scale_inv")


class HFWeights:
    """The tensors of an HF folder. Opening the folder reads the headers only.

    The files are the ones that transformers reads: safetensors take precedence over pickles, and
    other files are ignored. Two different sets of files in one format are refused.
    """

    def __init__(
        self, folder: Path | str, *, allow_pickle: bool = False, quantization: str | None = None
    ):
        """
        Args:
            allow_pickle: also read pytorch_model.bin, with torch.load(weights_only=True).
            quantization: method by which the weights are quantized (mxfp4.METHOD). None: they are
                not, and a quantized tensor is refused.
        Raises:
            CheckpointError: no weights, two sets of weights, an adapter in the folder, a file that
                is missing, truncated or outside the folder, or an index that disagrees with its
                files.
        """
        self.folder = Path(folder)
        self._allow_pickle = allow_pickle
        self._quantization = quantization
        self._files: dict[str, _File] = {}
        self._location = self._locate()

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Dtypes and shapes of all tensors, in the order of the files.

        Raises:
            CheckpointError: a tensor has a dtype other than fp32, bf16 or fp16.
        """
        tensors = {}
        for file, names in _grouped(self._location).items():
            infos = self._open(file).infos
            tensors |= {name: infos[name] for name in infos if name in names}
        return tensors

    def check(self, architecture: Architecture) -> list[str]:
        """Check that the folder has the architecture's tensors and no others.

        Returns:
            Names of the other tensors: buffers that transformers recomputes, a tied head that
            repeats the embedding, and layers that predict further tokens.
        Raises:
            CheckpointError: a tensor is missing, unexpected or quantized, or has another shape, or
                a head that config.json ties to the embedding has other values.
        """
        expected, name = architecture.file_shapes, architecture.family.architecture
        if self._quantization is not None:
            elements = architecture.elements.values()
            expected = packed_shapes(expected, elements, self.folder)
        for tensor in self._location:
            if tensor.endswith(_QUANTIZED):
                raise CheckpointError(
                    f"{self._where(tensor)} belongs to a quantized checkpoint (GPTQ, AWQ or FP8); "
                    "expected fp32, bf16 or fp16 weights"
                )
        missing = [tensor for tensor in expected if tensor not in self._location]
        if missing:
            raise CheckpointError(
                f"{self.folder}: {_some(missing)} missing; expected all tensors of {name} with the "
                "sizes in config.json"
            )
        extra = [tensor for tensor in self._location if tensor not in expected]
        for tensor in extra:
            is_known = architecture.is_untrained(tensor) or tensor in HEAD.hf
            if not is_known and not _IGNORED.fullmatch(tensor):
                raise CheckpointError(
                    f"{self.folder / self._location[tensor]}: unexpected tensor {tensor}; "
                    f"{name} with the sizes in config.json has no tensor of this name"
                )
        for tensor, shape in expected.items():
            actual = self.tensors[tensor].shape
            if actual != shape:
                raise CheckpointError(
                    f"{self._where(tensor)} has shape {list(actual)}; expected {list(shape)} by "
                    "config.json"
                )
            is_packed = tensor not in architecture.file_shapes
            if is_packed != (self.tensors[tensor].dtype == torch.uint8):
                raise CheckpointError(
                    f"{self._where(tensor)} has dtype {self.tensors[tensor].dtype}; expected "
                    f"{'bytes' if is_packed else 'fp32, bf16 or fp16 weights'}"
                )
        if architecture.tied_embeddings:
            self._check_tied_head()
        return extra

    def _check_tied_head(self) -> None:
        """Check that a tied head, if present, equals the embedding. Reads a few rows at a time."""
        [embedding], [head] = EMBEDDING.hf, HEAD.hf
        if head not in self._location:
            return
        pairs = zip(self._pieces(embedding), self._pieces(head), strict=True)
        if self.tensors[embedding] != self.tensors[head] or not all(
            torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs
        ):
            raise CheckpointError(
                f"{self._where(head)} has other values than {embedding}, although "
                "tie_word_embeddings in config.json is true. transformers 4 ignores this head, "
                "transformers 5 uses it. Set tie_word_embeddings to false to keep the head, or "
                "remove the tensor to tie it."
            )

    def _pieces(self, name: str) -> Iterator[Tensor]:
        """Yield a matrix's rows, some megabytes at a time. A piece is valid until the next one."""
        rows, columns = self.tensors[name].shape
        step, buffer = max(1, _PIECE // columns), Buffer()
        for start in range(0, rows, step):
            yield self.read_part(name, 0, start, min(start + step, rows), buffer)

    def read(self, name: str, buffer: Buffer | None = None) -> Tensor:
        """Read a whole tensor, into the buffer if given, otherwise into new memory."""
        return self._open(self._location[name]).read(name, (), buffer or Buffer())

    def read_part(
        self, name: str, dim: int, start: int, end: int, buffer: Buffer | None = None
    ) -> Tensor:
        """Read [start, end) along dim 0 or 1 of a tensor. Only dim 0 uses the buffer."""
        part = (*[slice(None)] * dim, slice(start, end))
        return self._open(self._location[name]).read(name, part, buffer or Buffer())

    def _where(self, tensor: str) -> str:
        return f"{self.folder / self._location[tensor]}: {tensor}"

    def _locate(self) -> dict[str, str]:
        """Return the file name of each tensor."""
        refuse_adapter(self.folder)
        for index, single in ((INDEX, SINGLE), (PICKLE_INDEX, PICKLE_SINGLE)):
            has_index, has_single = (os.path.exists(self.folder / f) for f in (index, single))
            if has_index:
                location = self._read_index(self.folder / index)
                if has_single and set(location.values()) != {single}:
                    raise CheckpointError(
                        f"{self.folder}: holds {single} and {index}, which names other files. "
                        f"transformers reads {single} and ignores the index. Remove the outdated "
                        "one."
                    )
                return location
            if has_single:
                return dict.fromkeys(self._open(single).infos, single)
        raise CheckpointError(f"{self.folder}: holds no weights; expected {SINGLE} or {INDEX}")

    def _read_index(self, path: Path) -> dict[str, str]:
        try:
            text = path.read_text(encoding="utf-8")
            weight_map = json.loads(text, object_pairs_hook=unique_keys)["weight_map"]
            location = {tensor: str(file) for tensor, file in weight_map.items()}
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        except _MALFORMED as error:
            raise CheckpointError(f"{path}: not an index of weights: {error!r}") from error
        held: dict[str, str] = {}
        for file, names in sorted(_grouped(location).items()):
            if Path(file).name != file:
                raise CheckpointError(f"{path}: names {file!r}, outside the folder")
            if not os.path.exists(self.folder / file):
                raise CheckpointError(f"{self.folder / file}: missing, but {path.name} names it")
            infos = self._open(file).infos
            for name in names:
                if name not in infos:
                    raise CheckpointError(f"{path}: lists {name} in {file}, which does not have it")
            for name in infos:
                if _IGNORED.fullmatch(name):
                    continue
                if name in held:
                    raise CheckpointError(
                        f"{path}: both {held[name]} and {file} hold {name}; remove one of them"
                    )
                if name not in names:
                    raise CheckpointError(
                        f"{path}: does not list {name}, which {file} holds. transformers 4 ignores "
                        "this tensor, transformers 5 reads it. Add the tensor to the index, or "
                        "remove it from the file."
                    )
                held[name] = file
        return location

    def _open(self, file: str) -> "_File":
        if file not in self._files:
            path = self.folder / file
            if path.suffix == ".safetensors":
                packed = {} if self._quantization is None else _PACKED
                self._files[file] = _Safetensors(path, DTYPES | packed)
            elif self._allow_pickle:
                self._files[file] = _Pickle(path)
            else:
                raise CheckpointError(
                    f"{path}: a pickle, which can run code when it is loaded. Save the model with "
                    "transformers' save_pretrained, or pass --allow-pickle to read weights only."
                )
        return self._files[file]


def refuse_adapter(folder: Path) -> None:
    """Raise CheckpointError if a PEFT adapter is in the folder.

    If peft is installed, transformers applies an adapter to the weights in the same folder.
    """
    for name in ADAPTER_FILES:
        if os.path.exists(folder / name):
            raise CheckpointError(
                f"{folder / name}: a PEFT adapter, which transformers applies to the weights if "
                "peft is installed. Merge the adapter first (peft's merge_and_unload, then "
                "save_pretrained into a new folder), or remove its files."
            )


class _File(Protocol):
    infos: dict[str, TensorInfo]

    def read(self, name: str, part: tuple[slice, ...], buffer: Buffer) -> Tensor: ...


class _Safetensors:
    """One safetensors file."""

    def __init__(self, path: Path, dtypes: Mapping[str, torch.dtype]):
        """
        Args:
            dtypes: accepted dtypes, by their names in safetensors.
        """
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
        except _MALFORMED as error:
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


class _Pickle:
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


def _grouped(location: Mapping[str, str]) -> dict[str, set[str]]:
    """Group tensor names by file, in the order of the files' names."""
    files: dict[str, set[str]] = {file: set() for file in sorted(set(location.values()))}
    for tensor, file in location.items():
        files[file].add(tensor)
    return files


def _some(names: list[str]) -> str:
    """Format the first few names of a list, and the number of the others."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more + (" is" if len(names) == 1 else " are")
