"""Reading of HF and Megatron checkpoints: the architecture, and tensors by HF names."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from aropd_mcore.convert.adapter import (
    AdaptedSource,
    AdapterSpec,
    PeftFolder,
    StoredAdapter,
    adapter_shapes,
    base_fingerprint,
    resolve_targets,
)
from aropd_mcore.convert.architecture import read_config
from aropd_mcore.convert.folders import ORDER, UNTRAINED
from aropd_mcore.convert.global_tensors import (
    ANY_LAYER,
    GlobalSlice,
    global_slice,
    read_part,
    stored_weights,
)
from aropd_mcore.convert.hf_io import HFWeights, refuse_adapter
from aropd_mcore.convert.json_file import CheckpointError, read_json
from aropd_mcore.convert.manifest import MANIFEST, newest, problems, read_manifest
from aropd_mcore.convert.mapping import EMBEDDING, Kind
from aropd_mcore.convert.model import Weight
from aropd_mcore.convert.stacked_files import UnstackedFiles
from aropd_mcore.convert.tensor_bytes import TensorInfo
from aropd_mcore.convert.tensors import (
    merge,
    pad_rows,
    padded_vocab_size,
    shard_bounds,
    split,
)
from aropd_mcore.convert.torch_dist import METADATA, TorchDistReader
from aropd_mcore.convert.weight_file import DTYPES

TRACKER = "latest_checkpointed_iteration.txt"
"""Name of a Megatron checkpoint's file with the number of the newest iteration, or `release`."""
BEST = "best"
"""Name of the link to the best checkpoint among a run's checkpoints (checkpoint.keep_best)."""
HF_FOLDER = "hf"
"""Name of the folder with config and tokenizer, next to an import's iterations or to a run's
`checkpoints`."""
TEACHER_PREFIX = "teacher."
"""Prefix of the teacher's tensors in a training checkpoint. The student's have Megatron's names."""

Role = Literal["student", "teacher"]


class HFSource:
    """A checkpoint in an HF folder."""

    iteration = None

    def __init__(self, path: Path, *, allow_pickle: bool = False):
        self.path = self.hf_folder = path
        self.config = read_config(path)
        self.architecture = self.config.architecture
        files = HFWeights(path, allow_pickle=allow_pickle, quantization=self.config.quantization)
        others, elements = files.check(self.architecture), self.architecture.elements
        self.files = UnstackedFiles(files, elements) if elements else files
        self.left_aside = [name for name in others if not self.architecture.is_untrained(name)]
        """Tensors of the files that are ignored, as in transformers."""
        expected, infos = self.architecture.hf_shapes, self.files.tensors
        self.untrained = {n: i for n, i in infos.items() if self.architecture.is_untrained(n)}
        """Dtypes and shapes of tensors that are only kept: layers that predict further tokens."""
        self.order = [name for name in infos if name in expected or name in self.untrained]
        """Names of all tensors but the ignored ones, in the order of the files."""
        self.tensors = {n: info for n, info in infos.items() if n in expected}
        """Dtypes and shapes of all weights by HF name, in the order of the files."""

    def read_untrained(self, name: str) -> Tensor:
        return self.files.read(name)

    def parts(self, weight: Weight) -> Iterator[tuple[str, Tensor]]:
        """Yield the HF tensors of one Megatron weight, one at a time."""
        return ((name, self.files.read(name)) for name in weight.hf)

    def shard(self, weight: Weight, tp_size: int, tp_rank: int) -> Tensor:
        """Read a tensor-parallel rank's shard of a Megatron weight.

        A vocabulary is padded with zero rows. Only the shard's bytes are read from the files.
        """
        parts = [read_part(self.files, weight, name, tp_size, tp_rank) for name in weight.hf]
        return merge(weight.kind, parts, num_kv_heads=self.architecture.num_kv_heads // tp_size)


class MegatronSource:
    """The student or the teacher of a Megatron checkpoint, written by any parallel layout."""

    def __init__(
        self, path: Path, iteration: Path, *, role: Role = "student", hf: Path | None = None
    ):
        self.path, self.iteration = path, iteration
        self.reader = TorchDistReader(iteration)
        self.hf_folder = hf or _hf_folder(iteration)
        self.config = read_config(self.hf_folder)
        self.architecture = self.config.architecture
        self._prefix = TEACHER_PREFIX if role == "teacher" else ""
        self._places = self._check()
        kept = self.hf_folder / UNTRAINED
        self._kept = HFWeights(kept) if kept.is_dir() else None
        self.untrained = self._kept.tensors if self._kept else {}
        """As HFSource.untrained, from the folder in which they are kept."""
        self.tensors = self._hf_tensors()
        """Dtypes and shapes of all weights by HF name, in the order of the original's files if
        known."""

    def read_untrained(self, name: str) -> Tensor:
        assert self._kept is not None
        return self._kept.read(name)

    @property
    def has_teacher(self) -> bool:
        return any(key.startswith(TEACHER_PREFIX) for key in self.reader.tensors)

    def parts(self, weight: Weight) -> Iterator[tuple[str, Tensor]]:
        """Yield the HF tensors of one Megatron weight. A tensor is valid until the next one."""
        where = self._places[weight.name]
        if weight.kind is Kind.QKV:
            heads = self.architecture.num_kv_heads, self.architecture.head_dim
            whole = self._read(where, (0, 0), where.shape)
            parts = split(weight.kind, whole, num_kv_heads=heads[0], head_dim=heads[1])
            yield from zip(weight.hf, parts, strict=True)
            return
        first_row = 0
        for name, shape in weight.hf.items():
            yield name, self._read(where, (first_row, 0), shape)
            first_row += shape[0]

    def shard(self, weight: Weight, tp_size: int, tp_rank: int) -> Tensor:
        """Read a tensor-parallel rank's shard of a Megatron weight.

        A vocabulary is padded with zero rows, also if fewer rows are stored than the weight has.
        Every stored chunk that overlaps the shard is read completely, and the chunks depend on the
        layout that wrote the checkpoint.
        """
        # A tied head is not stored.
        where = self._places.get(weight.name) or self._places[EMBEDDING.name]
        dim = weight.kind.split_dim
        if dim is None:
            return self._read(where, (0, 0), where.shape)
        parts, first_row = [], 0
        stored = self.reader.tensors[self._prefix + where.key].shape
        # A shard of QKV, which is merged per head, is contiguous. Gate and up are cut separately.
        for shape in [where.shape] if weight.kind is Kind.QKV else weight.hf.values():
            size = shape[dim]
            padded = padded_vocab_size(size, tp_size) if weight.kind is Kind.VOCAB else size
            size = min(size, stored[0]) if weight.kind is Kind.VOCAB else size
            start, end = (min(b, size) for b in shard_bounds(padded, tp_size, tp_rank))
            box = (*shape[:dim], end - start, *shape[dim + 1 :])
            first = (first_row + start, 0) if dim == 0 else (first_row, start)
            part = self._read(where, first, box).clone()  # the next read reuses the memory
            parts.append(pad_rows(part, padded // tp_size) if dim == 0 else part)
            first_row += shape[0]
        return torch.cat(parts)

    def _read(self, where: GlobalSlice, first: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
        """Read a box of a weight that starts at a row and a column."""
        start = first[: len(shape)]
        return self.reader.read(self._prefix + where.key, where.lead, start, shape)

    def _check(self) -> dict[str, GlobalSlice]:
        """Locate all weights, by Megatron name. Checks that no tensor is missing or unexpected."""
        family, places = self.architecture.family.architecture, dict[str, GlobalSlice]()
        stacked = self._prefix + ANY_LAYER in self.reader.tensors
        keys = self._keys()
        if not keys and self._prefix:
            raise _no_teacher(self.iteration)
        for weight in stored_weights(self.architecture):
            where = places[weight.name] = global_slice(weight, self.architecture, stacked=stacked)
            info = self.reader.tensors.get(self._prefix + where.key)
            if info is None:
                raise CheckpointError(
                    f"{self.iteration}: {self._prefix + where.key} is missing; {family} needs it"
                )
            if info.dtype not in DTYPES.values():
                raise CheckpointError(
                    f"{self.iteration}: {self._prefix + where.key} is {info.dtype}; expected fp32, "
                    "bf16 or fp16"
                )
            if not _holds(info.shape, where, weight):
                raise CheckpointError(
                    f"{self.iteration}: {self._prefix + where.key} has shape {list(info.shape)}; "
                    f"expected {list(where.global_shape)} by {self.hf_folder / 'config.json'}"
                )
            keys.discard(where.key)
        if keys:
            raise CheckpointError(
                f"{self.iteration}: unexpected tensor {self._prefix}{min(keys)}; {family} has no "
                "tensor of this name"
            )
        return places

    def _keys(self) -> set[str]:
        """Return the keys of this model's tensors, without their prefix."""
        return {
            key.removeprefix(self._prefix)
            for key in self.reader.tensors
            if key.startswith(
                tuple(self._prefix + name for name in ("embedding.", "decoder.", "output_layer."))
            )
        }

    def _hf_tensors(self) -> dict[str, TensorInfo]:
        infos = {}
        for weight in stored_weights(self.architecture):
            dtype = self.reader.tensors[self._prefix + self._places[weight.name].key].dtype
            infos |= {name: TensorInfo(dtype, shape) for name, shape in weight.hf.items()}
        order = self.hf_folder / ORDER
        self.order = [*infos, *self.untrained]
        if not order.exists():
            return infos
        names = read_json(order)
        if not isinstance(names, list) or sorted(map(str, names)) != sorted(self.order):
            raise CheckpointError(f"{order}: does not list the tensors that config.json describes")
        self.order = names
        return {name: infos[name] for name in names if name in infos}


Source = HFSource | MegatronSource | AdaptedSource


def with_vocabulary(source: Source, vocab_size: int) -> Source:
    """Return a source of the same model with vocab_size rows in its embedding and its head.

    Further rows are left out, and missing rows are zero.
    """
    resized = copy.copy(source)
    resized.architecture = replace(source.architecture, vocab_size=vocab_size)
    return resized


def find_hf_folder(path: Path) -> Path:
    """Return the folder of a checkpoint's config.json and tokenizer.

    Args:
        path: see open_source. An HF folder needs no weights.
    Raises:
        CheckpointError: as find_iteration. Also if a Megatron checkpoint has no such folder.
    """
    iteration = find_iteration(path)
    return path if iteration is None else _hf_folder(iteration)


def open_source(
    path: Path,
    *,
    role: Role = "student",
    hf: Path | None = None,
    allow_pickle: bool = False,
    adapter: Path | None = None,
) -> Source:
    """Open a checkpoint and check that it matches its config.json.

    Args:
        path: an HF folder, a Megatron checkpoint, one of its iterations, or a run's output_dir.
        role: the model to read from a training checkpoint.
        hf: folder of config.json, for a Megatron checkpoint without its own. For a run that trains
            an adapter, the base model, if it is not at the run's model.path any more.
        allow_pickle: see HFWeights.
        adapter: PEFT folder to merge into the weights of an HF folder.
    Raises:
        CheckpointError: the path is not a checkpoint, or the checkpoint is incomplete.
    """
    iteration = find_iteration(path)
    if adapter is not None:
        if iteration is not None or role == "teacher":
            raise CheckpointError(
                f"{path}: expected the HF folder of the base model of {adapter}; a Megatron or "
                "training checkpoint has its own weights: export it first"
            )
        base = HFSource(path, allow_pickle=allow_pickle)
        return AdaptedSource(base, PeftFolder(adapter, base.architecture))
    if iteration is not None:
        run = _run_with_adapter(iteration)
        if run is not None:
            return _open_adapter_of_run(iteration, run, role, hf, allow_pickle=allow_pickle)
        return MegatronSource(path, iteration, role=role, hf=hf)
    if not (path / "config.json").exists():
        refuse_adapter(path)
        raise CheckpointError(
            f"{path}: not a checkpoint; expected config.json (HF), or {TRACKER} or {METADATA} "
            "(Megatron's torch_dist)"
        )
    if role == "teacher":
        raise CheckpointError(f"{path}: an HF folder holds one model and no teacher")
    return HFSource(path, allow_pickle=allow_pickle)


def _run_with_adapter(iteration: Path) -> dict[str, Any] | None:
    """Return the manifest of a checkpoint whose run trains an adapter. None for others."""
    if not (iteration / MANIFEST).exists():
        return None
    manifest = read_manifest(iteration)
    return manifest if manifest.get("config", {}).get("adapter") else None


def _open_adapter_of_run(
    iteration: Path, run: dict[str, Any], role: Role, hf: Path | None, *, allow_pickle: bool
) -> Source:
    """Open the adapter of a training checkpoint, merged into its base model."""
    path = hf or Path(run["config"]["model"]["path"])
    if not path.is_dir():
        raise CheckpointError(
            f"{iteration}: has an adapter of the base model {path}, which does not exist here; "
            "work in the folder in which training was started, or pass --hf with the base model"
        )
    base = HFSource(path, allow_pickle=allow_pickle)
    found, saved = base_fingerprint(base), run["contents"]["adapter.base"]
    if found != saved:
        raise CheckpointError(
            f"{path}: has other weights than the base model of the adapter in {iteration} "
            f"(fingerprint {found}, expected {saved}); pass --hf with that model"
        )
    # A run with several teachers has no section `teacher`. Its teachers are other models.
    teacher = run["config"].get("teacher", {"kind": "model"})
    kind = teacher["kind"] if run["config"]["objective"]["name"] != "sft" else None
    if role == "teacher" and kind == "frozen":
        return base
    if role == "teacher" and kind != "ema":
        raise _no_teacher(iteration)
    settings = run["config"]["adapter"]
    targets = resolve_targets(base.architecture, settings["targets"])
    spec = AdapterSpec(settings["rank"], settings["alpha"], targets)
    prefix = TEACHER_PREFIX if role == "teacher" else ""
    adapter = StoredAdapter(iteration, spec, adapter_shapes(base.architecture, spec), prefix)
    has_teacher = kind in ("ema", "frozen")
    return AdaptedSource(base, adapter, iteration=iteration, has_teacher=has_teacher)


def _no_teacher(iteration: Path) -> CheckpointError:
    return CheckpointError(
        f"{iteration}: has no teacher; runs with teacher.kind live or model and sft runs save "
        "none. A teacher of kind model is the checkpoint at teacher.path"
    )


def find_iteration(path: Path) -> Path | None:
    """Find the folder with the tensors of a Megatron checkpoint. None if `path` is not one.

    For a run, this is the newest checkpoint with a valid manifest. The sizes of its files must
    match the manifest.

    Raises:
        CheckpointError: the tracker file names a missing iteration, or the newest checkpoint of a
            run does not match its manifest.
    """
    if (path / METADATA).exists():
        return _checked(path.resolve() if path.is_symlink() else path)  # a link to the best one
    for folder in (path, path / "checkpoints"):
        of_run = newest(folder)
        if of_run is not None:
            return _checked(of_run)
        tracker = folder / TRACKER
        if tracker.exists():
            text = tracker.read_text(errors="replace").strip()
            iteration = folder / (f"iter_{int(text):07d}" if text.isdecimal() else text)
            if not (iteration / METADATA).exists():
                metadata = iteration / METADATA
                raise CheckpointError(f"{tracker}: names {text}, but {metadata} is missing")
            return iteration
    return None


def best_checkpoint(run: Path) -> Path:
    """Return the best checkpoint of a run (checkpoint.keep_best).

    Raises:
        CheckpointError: the run has none.
    """
    link = run / "checkpoints" / BEST
    if not link.is_dir():
        raise CheckpointError(
            f"{link}: no such folder; expected the output_dir of a run with checkpoint.keep_best "
            "and a validation that was better than the one at the start"
        )
    return link


def _checked(iteration: Path) -> Path:
    if (iteration / MANIFEST).exists():  # written by runs, not by Megatron or by an import
        wrong = problems(iteration, with_sums=False)
        if wrong:
            raise CheckpointError(f"{wrong[0]}; an earlier checkpoint may be intact")
    return iteration


def _hf_folder(iteration: Path) -> Path:
    parent = iteration.absolute().parent
    for folder in (parent / HF_FOLDER, parent.parent / HF_FOLDER):
        if (folder / "config.json").exists():
            return folder
    raise CheckpointError(
        f"{iteration}: {parent / HF_FOLDER / 'config.json'} is missing; pass --hf with an HF "
        "folder of the same model, which has its config and tokenizer"
    )


def _holds(shape: tuple[int, ...], where: GlobalSlice, weight: Weight) -> bool:
    if weight.kind is Kind.VOCAB:  # the padding depends on the layout that wrote the checkpoint
        (size, *_) = next(iter(weight.hf.values()))
        return shape[0] >= size and shape[1:] == where.shape[1:]
    return shape == where.global_shape
