"""Reading of HF folders, one tensor or part of a tensor at a time.

Opening a folder reads the headers only.
"""

import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from aropd_mcore.convert.architecture import Architecture
from aropd_mcore.convert.dequantize import (
    FP8,
    FP8_NAME,
    SCALE_SUFFIX,
    Quantization,
    check_scales,
    dequantize,
)
from aropd_mcore.convert.json_file import CheckpointError, unique_keys
from aropd_mcore.convert.mapping import EMBEDDING, HEAD, IGNORED_HF_TENSORS
from aropd_mcore.convert.mxfp4 import METHOD, packed_shapes
from aropd_mcore.convert.tensor_bytes import Buffer, TensorInfo
from aropd_mcore.convert.weight_file import DTYPES, MALFORMED, Pickle, Safetensors, WeightFile

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLE_INDEX = "pytorch_model.bin.index.json"
PICKLE_SINGLE = "pytorch_model.bin"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")

_IGNORED = re.compile(IGNORED_HF_TENSORS)
_BYTES = {"U8": torch.uint8}  # of packed weights
_PIECE = 2**22  # number of elements of a tensor that are compared at a time
_QUANTIZED = (".qweight", ".qzeros", ".scales", ".g_idx", ".weight_scale", ".weight_scale_inv")


class HFWeights:
    """The tensors of an HF folder. Opening the folder reads the headers only.

    The files are the ones that transformers reads: safetensors take precedence over pickles, and
    other files are ignored. Two different sets of files in one format are refused.

    Weights in FP8 are read as bf16 (see dequantize.py). Their scales are not listed.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        allow_pickle: bool = False,
        quantization: Quantization | None = None,
    ):
        """
        Args:
            allow_pickle: also read pytorch_model.bin, with torch.load(weights_only=True).
            quantization: how the weights are quantized. None: they are not, and a quantized tensor
                is refused.
        Raises:
            CheckpointError: no weights, two sets of weights, an adapter in the folder, a file that
                is missing, truncated or outside the folder, or an index that disagrees with its
                files.
        """
        self.folder = Path(folder)
        self._allow_pickle = allow_pickle
        self._is_packed = quantization == METHOD
        self._block = quantization if isinstance(quantization, tuple) else None
        self._files: dict[str, WeightFile] = {}
        self._location = self._locate()
        self._scales: dict[str, str] = {}
        """Names of the scales of weights in FP8, by weight."""
        if self._block:
            names = [name for name in self._location if name.endswith(SCALE_SUFFIX)]
            self._scales = {name.removesuffix(SCALE_SUFFIX): name for name in names}
        self._scale_names = frozenset(self._scales.values())
        self._fp8_buffers = _Buffers()

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Dtypes and shapes of all tensors, in the order of the files.

        Raises:
            CheckpointError: a tensor has a dtype other than fp32, bf16 or fp16, or is in FP8
                without matching scales.
        """
        tensors = {}
        for file, names in _grouped(self._location).items():
            infos = self._open(file).infos
            tensors |= {name: infos[name] for name in infos if name in names}
        if self._block is None:
            return tensors
        in_fp8 = [name for name, info in tensors.items() if info.dtype == FP8]
        for name in dict.fromkeys((*in_fp8, *self._scales)):
            scales = tensors.get(self._scales.get(name, ""))
            if name not in tensors:
                raise CheckpointError(f"{self._where(self._scales[name])} has no weight {name}")
            check_scales(
                str(self.folder / self._location[name]), name, tensors, scales, self._block
            )
        return {
            name: TensorInfo(torch.bfloat16, info.shape) if name in self._scales else info
            for name, info in tensors.items()
            if name not in self._scale_names
        }

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
        if self._is_packed:
            elements = architecture.elements.values()
            expected = packed_shapes(expected, elements, self.folder)
        names = [tensor for tensor in self._location if tensor not in self._scale_names]
        for tensor in names:
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
        extra = [tensor for tensor in names if tensor not in expected]
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
        return self._read(name, (), (0, 0), buffer or Buffer())

    def read_part(
        self, name: str, dim: int, start: int, end: int, buffer: Buffer | None = None
    ) -> Tensor:
        """Read [start, end) along dim 0 or 1 of a tensor. Only dim 0 uses the buffer."""
        part = (*[slice(None)] * dim, slice(start, end))
        first = (0, start) if dim else (start, 0)
        return self._read(name, part, first, buffer or Buffer())

    def _read(
        self, name: str, part: tuple[slice, ...], start: tuple[int, int], buffer: Buffer
    ) -> Tensor:
        """Read a part of a tensor, which starts at this row and column."""
        file = self._open(self._location[name])
        if name not in self._scales:
            return file.read(name, part, buffer)
        assert self._block
        buffers, scales = self._fp8_buffers, self._scales[name]
        whole = self._open(self._location[scales]).read(scales, (), buffers.scales)
        values = file.read(name, part, buffers.values)
        return dequantize(values, whole, start, self._block, buffer)

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
        except MALFORMED as error:
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

    def _open(self, file: str) -> WeightFile:
        if file not in self._files:
            path = self.folder / file
            if path.suffix == ".safetensors":
                extra = {FP8_NAME: FP8} if self._block else {}
                extra |= _BYTES if self._is_packed else {}
                self._files[file] = Safetensors(path, DTYPES | extra)
            elif self._allow_pickle:
                self._files[file] = Pickle(path)
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
                "peft is installed. Keep the adapter in a folder of its own: `aropd convert export "
                "MODEL_DIR NEW_DIR --adapter ADAPTER_DIR` merges it, `--adapter` of other commands "
                "reads it, and adapter.path trains it."
            )


class _Buffers(threading.local):
    """Buffers of one thread, for weights in FP8 and for their scales."""

    def __init__(self) -> None:
        self.values, self.scales = Buffer(), Buffer()


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
