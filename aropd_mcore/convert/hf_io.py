"""HF folders on disk: safetensors read lazily, a slice at a time, and written as a stream."""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from aropd_mcore.convert.architecture import Architecture, CheckpointError
from aropd_mcore.convert.mapping import HEAD, IGNORED_HF_TENSORS

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_SHARD_BYTES = 5_000_000_000

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_COMPANION_SUFFIXES = {".json", ".jinja", ".model", ".tiktoken", ".txt"}


class HFWeights:
    """The tensors of an HF folder; opening it reads the safetensors headers alone."""

    def __init__(self, folder: Path | str):
        """
        Raises:
            CheckpointError: no safetensors, a file that is missing, truncated or outside the
                folder, or an index that names a tensor its file does not have.
        """
        self.folder = Path(folder)
        self._files: dict[str, Any] = {}
        self.location = self._read_index() if (self.folder / INDEX).exists() else self._scan()
        """Tensor name -> file name."""

    def check(self, architecture: Architecture) -> None:
        """Raise CheckpointError unless the folder holds the architecture's tensors and no others.

        Left aside are buffers that transformers recomputes, and a head beside tied embeddings,
        which transformers does not read either.
        """
        expected = architecture.hf_shapes
        name = architecture.family.architecture
        missing = [tensor for tensor in expected if tensor not in self.location]
        if missing:
            raise CheckpointError(
                f"{self.folder}: {_some(missing)} missing; {name} of config.json's sizes needs "
                f"{'it' if len(missing) == 1 else 'them'}"
            )
        ignored = re.compile("|".join([IGNORED_HF_TENSORS, *map(re.escape, HEAD.hf)]))
        for tensor in self.location.keys() - expected.keys():
            if not ignored.fullmatch(tensor):
                raise CheckpointError(
                    f"{self.folder / self.location[tensor]}: unexpected tensor {tensor}; "
                    f"{name} of config.json's sizes has none of that name"
                )
        for tensor, shape in expected.items():
            self._check_tensor(tensor, shape)

    def read(self, name: str) -> Tensor:
        return self._slice(name)[:]

    def read_part(self, name: str, dim: int, start: int, end: int) -> Tensor:
        """[start, end) along dim 0 or 1 of the tensor; only that part is read from disk."""
        part = slice(start, end)
        return self._slice(name)[part if dim == 0 else (slice(None), part)]

    def _check_tensor(self, name: str, expected: tuple[int, ...]) -> None:
        tensor = self._slice(name)
        where = f"{self.folder / self.location[name]}: {name}"
        found = tuple(tensor.get_shape())
        if found != expected:
            raise CheckpointError(
                f"{where} has shape {list(found)}; config.json says {list(expected)}"
            )
        dtypes = _DTYPE_NAMES.values()
        if tensor.get_dtype() not in dtypes:
            raise CheckpointError(
                f"{where} has dtype {tensor.get_dtype()}; expected one of {', '.join(dtypes)} "
                "(quantized checkpoints cannot be loaded)"
            )

    def _read_index(self) -> dict[str, str]:
        path = self.folder / INDEX
        try:
            weight_map = json.loads(path.read_text())["weight_map"]
            location = {tensor: str(file) for tensor, file in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: not a safetensors index: {error!r}") from error
        held = {}
        for file in sorted(set(location.values())):
            if Path(file).name != file:
                raise CheckpointError(f"{path}: names {file!r}, outside the folder")
            held[file] = set(self._open(file).keys())
        for tensor, file in location.items():
            if tensor not in held[file]:
                raise CheckpointError(f"{path}: says that {file} holds {tensor}; it does not")
        return location

    def _scan(self) -> dict[str, str]:
        if not (self.folder / SINGLE).exists():
            pickles = sorted(path.name for path in self.folder.glob("*.bin"))
            found = f"; found {pickles[0]}, and pickles are not read" if pickles else ""
            raise CheckpointError(
                f"{self.folder}: neither {SINGLE} nor {INDEX} is there{found}. Save the model "
                "with transformers' save_pretrained to get one."
            )
        return dict.fromkeys(self._open(SINGLE).keys(), SINGLE)

    def _slice(self, name: str) -> Any:
        return self._open(self.location[name]).get_slice(name)

    def _open(self, file: str) -> Any:
        if file not in self._files:
            path = self.folder / file
            if not path.exists():
                raise CheckpointError(f"{path}: missing; {INDEX} names it")
            try:
                self._files[file] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path}: not a whole safetensors file: {error}") from error
        return self._files[file]


def write_safetensors(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write tensors as transformers lays them out: one file, or shards and their index.

    A file's header is written before its tensors come, from the shapes; so one tensor at a time is
    in memory.

    Args:
        shapes: name -> shape of all tensors, in the order in which `tensors` gives them.
        dtype: of the files; tensors are cast to it.
        max_shard_bytes: a file holds no more than this, unless a single tensor does.
    """
    num_bytes = {name: _numel(shape) * dtype.itemsize for name, shape in shapes.items()}
    shards = _plan_shards(num_bytes, max_shard_bytes)
    names = [SINGLE] if len(shards) == 1 else _shard_names(len(shards))
    stream = iter(tensors)
    for file_name, shard in zip(names, shards, strict=True):
        with open(folder / file_name, "wb") as file:
            file.write(_header({name: shapes[name] for name in shard}, dtype))
            for expected in shard:
                name, tensor = next(stream)
                assert (name, tuple(tensor.shape)) == (expected, tuple(shapes[expected])), name
                data = tensor.detach().to("cpu", dtype).contiguous()
                file.write(data.flatten().view(torch.uint8).numpy().data)
    assert next(stream, None) is None, "more tensors than shapes"
    if len(shards) > 1:
        weight_map = {
            name: file for file, shard in zip(names, shards, strict=True) for name in shard
        }
        index = {"metadata": {"total_size": sum(num_bytes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def copy_companions(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Copy what stands beside the weights: config, generation config, tokenizer, template, license.

    config.json gets the dtype of the weights, which transformers loads them in.
    """
    for path in sorted(source.iterdir()):
        is_license = path.name.upper().startswith(("LICENSE", "NOTICE"))
        wanted = path.suffix in _COMPANION_SUFFIXES or is_license
        if path.is_file() and wanted and not path.name.endswith(".index.json"):
            shutil.copyfile(path, target / path.name)
    config = json.loads((source / "config.json").read_text())
    key = "torch_dtype" if "torch_dtype" in config else "dtype"  # transformers 4, 5
    config[key] = str(dtype).removeprefix("torch.")
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def refuse_existing(target: Path) -> None:
    """Raise CheckpointError if there is something at `target`."""
    if target.exists():
        raise CheckpointError(f"{target}: exists already; remove it or name another folder")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill that takes its name, `target`, only when the block has ended well.

    It is filled under a temporary name beside the target; a kill leaves that behind, and the next
    call for the same target removes it.
    """
    refuse_existing(target)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in (*partial.iterdir(), partial):
            _sync(path)
        partial.rename(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _plan_shards(num_bytes: Mapping[str, int], limit: int) -> list[list[str]]:
    shards, filled = [[]], 0
    for name, size in num_bytes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _shard_names(count: int) -> list[str]:
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def _header(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    """The start of a safetensors file: the length of a JSON header, and the header."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + _numel(shape) * dtype.itemsize
        header[name] = {
            "dtype": _DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format's alignment
    return len(text).to_bytes(8, "little") + text


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _some(names: list[str]) -> str:
    """The first few names of a list, and how many more."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more + (" is" if len(names) == 1 else " are")
