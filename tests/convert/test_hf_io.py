"""Safetensors folders, compared with the safetensors library."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from aropd_mcore.convert import hf_io
from aropd_mcore.convert.architecture import CheckpointError, read_architecture
from aropd_mcore.convert.hf_io import INDEX, SINGLE, HFWeights
from aropd_mcore.convert.hf_write import SafetensorsWriter, write_safetensors
from aropd_mcore.convert.tensor_bytes import TensorInfo
from tests.support.tiny_models import save_tiny_model

TENSORS = {
    "z.matrix": torch.randn(6, 10),
    "a.bf16": torch.randn(4, 3).bfloat16(),
    "vector": torch.randn(7).half(),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 5),
    "odd": torch.randn(1, 1, 3).half(),
    "cube": torch.randn(2, 3, 4).bfloat16(),
}


def infos(tensors: dict[str, Tensor]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(t.dtype, tuple(t.shape)) for name, t in tensors.items()}


@pytest.mark.parametrize(("limit", "num_files"), [(10**9, 1), (300, 2), (1, 7)])
def test_safetensors_reads_written_folders(limit: int, num_files: int, tmp_path: Path):
    backwards = reversed(TENSORS.items())  # tensors may be written in any order
    write_safetensors(tmp_path, infos(TENSORS), backwards, max_shard_bytes=limit)
    files = sorted(tmp_path.glob("*.safetensors"))
    if num_files == 1:
        assert [path.name for path in tmp_path.iterdir()] == [SINGLE]
        held = {SINGLE: list(TENSORS)}
    else:
        assert files[0].name == f"model-00001-of-{num_files:05}.safetensors"
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())
        assert list(index["weight_map"]) == list(TENSORS)
        held = {path.name: [] for path in files}
        for name, file in index["weight_map"].items():
            held[file].append(name)
    assert len(files) == num_files
    for file, names in held.items():
        loaded = load_file(tmp_path / file)
        assert loaded.keys() == set(names)
        for name in names:
            assert loaded[name].dtype == TENSORS[name].dtype
            assert torch.equal(loaded[name], TENSORS[name])
        with safe_open(tmp_path / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        length = int.from_bytes((tmp_path / file).read_bytes()[:8], "little")
        assert length % 8 == 0  # the format aligns the data


def test_folders_that_safetensors_wrote_are_read(tmp_path: Path):
    save_file(TENSORS, tmp_path / SINGLE, metadata={"format": "pt", "note": "π"})
    weights = HFWeights(tmp_path)
    header = (tmp_path / SINGLE).read_bytes()
    in_file_order = sorted(TENSORS, key=lambda name: header.index(f'"{name}"'.encode()))
    assert list(weights.tensors) == in_file_order != list(TENSORS)
    assert weights.tensors == infos(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(weights.read(name), tensor)
        for dim in range(min(tensor.dim(), 2)):
            size = tensor.size(dim)
            for start, end in ((0, size), (size // 3, size - 1), (size // 2, size // 2)):
                end = max(start, end)
                part = weights.read_part(name, dim, start, end)
                assert torch.equal(part, tensor.narrow(dim, start, end - start))
                assert part.is_contiguous() and part.untyped_storage().nbytes() == part.nbytes


def test_a_file_that_is_truncated_during_reading_is_refused(tmp_path: Path):
    save_file({"a": torch.randn(10, 10)}, tmp_path / SINGLE)
    weights = HFWeights(tmp_path)
    assert weights.tensors
    (tmp_path / SINGLE).write_bytes((tmp_path / SINGLE).read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: ends within a tensor"):
        weights.read("a")


def test_tensors_have_the_order_of_the_files(tmp_path: Path):
    model = save_tiny_model("llama", tmp_path, num_hidden_layers=2, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    weights = HFWeights(tmp_path)
    files = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    in_files = [files[name] for name in weights.tensors]
    assert in_files == sorted(in_files)
    assert weights.check(read_architecture(tmp_path)) == []
    for name, tensor in model.state_dict().items():
        assert torch.equal(weights.read(name), tensor)


def test_a_tensor_is_cast_to_the_declared_dtype(tmp_path: Path):
    tensor = torch.randn(5, 4)
    with SafetensorsWriter(tmp_path, {"t": TensorInfo(torch.bfloat16, (4, 5))}) as writer:
        writer.write("t", tensor.T)
    assert torch.equal(load_file(tmp_path / SINGLE)["t"], tensor.T.bfloat16())


@pytest.mark.parametrize("mistake", ["missing", "twice", "shape"])
def test_a_writer_refuses_tensors_that_differ_from_the_declared_ones(mistake: str, tmp_path: Path):
    with (
        pytest.raises((AssertionError, KeyError)),
        SafetensorsWriter(tmp_path, infos({"a": torch.ones(2), "b": torch.ones(3)})) as writer,
    ):
        writer.write("a", torch.ones(3 if mistake == "shape" else 2))
        if mistake == "twice":
            writer.write("a", torch.ones(2))


def test_more_shards_than_a_process_may_open_are_written_and_read(tmp_path: Path):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    tensors = {f"t{number}": torch.full((2,), float(number)) for number in range(200)}
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    try:
        write_safetensors(tmp_path, infos(tensors), tensors.items(), max_shard_bytes=8)
        weights = HFWeights(tmp_path)
        assert all(torch.equal(weights.read(name), tensor) for name, tensor in tensors.items())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_rotary_buffers_and_a_repeated_head_are_ignored(tmp_path: Path):
    """Old Llama files have rotary buffers. Files converted from .bin repeat a tied embedding."""
    model = save_tiny_model("llama", tmp_path, tie=True, num_hidden_layers=1)
    extras = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "lm_head.weight": model.get_input_embeddings().weight.detach().clone(),
    }
    save_file({**load_file(tmp_path / SINGLE), **extras}, tmp_path / SINGLE)
    assert set(HFWeights(tmp_path).check(read_architecture(tmp_path))) == extras.keys()


def _last_element_changed(embedding: Tensor) -> Tensor:
    head = embedding.clone()
    head[-1, -1] += 1.0
    return head


@pytest.mark.parametrize(
    "head",
    [
        _last_element_changed,
        torch.zeros_like,
        Tensor.half,
        lambda e: e[:-1].clone(),
        Tensor.flatten,
    ],
    ids=["one element", "zeros", "dtype", "rows", "flat"],
)
def test_a_head_that_differs_from_tied_embeddings_is_refused(head, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(hf_io, "_PIECE", 1000)  # a piece is a few rows
    model = save_tiny_model("qwen2", tmp_path, tie=True, num_hidden_layers=1)
    own = head(model.get_input_embeddings().weight.detach())
    save_file({**load_file(tmp_path / SINGLE), "lm_head.weight": own}, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has other values than .*tie_word"):
        HFWeights(tmp_path).check(read_architecture(tmp_path))
