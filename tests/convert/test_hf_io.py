"""Safetensors folders: lazy reading, streamed and atomic writing, and every complaint."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from aropd_mcore.convert import hf_io
from aropd_mcore.convert.architecture import CheckpointError, read_architecture
from aropd_mcore.convert.hf_io import HFWeights, copy_companions, new_folder, write_safetensors
from tests.tiny_models import save_tiny_model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A tiny model in several files."""
    folder = tmp_path / "model"
    save_tiny_model("qwen2", folder, num_hidden_layers=1, max_shard_size="100KB")
    return folder


def test_reads_parts_of_tensors(saved: Path):
    weights = HFWeights(saved)
    assert len(set(weights.location.values())) > 1
    name = "model.layers.0.mlp.down_proj.weight"
    whole = load_file(saved / weights.location[name])[name]
    assert torch.equal(weights.read(name), whole)
    assert torch.equal(weights.read_part(name, 0, 3, 7), whole[3:7])
    assert torch.equal(weights.read_part(name, 1, 3, 7), whole[:, 3:7])
    assert weights.read_part(name, 0, 64, 64).shape == (0, 96)
    weights.check(read_architecture(saved))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [10**9, 50, 1])
def test_writes_what_safetensors_reads(dtype: torch.dtype, limit: int, tmp_path: Path):
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).double(), "c": torch.randn(2, 2, 2)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    write_safetensors(tmp_path, shapes, dtype, tensors.items(), max_shard_bytes=limit)
    weights = HFWeights(tmp_path)
    assert list(weights.location) == ["a", "b", "c"]
    for name, tensor in tensors.items():
        assert torch.equal(weights.read(name), tensor.to(dtype))
        assert torch.equal(load_file(tmp_path / weights.location[name])[name], tensor.to(dtype))
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    if limit == 10**9:
        assert files == ["model.safetensors"]
    else:
        index = json.loads((tmp_path / hf_io.INDEX).read_text())
        assert index["metadata"]["total_size"] == 30 * dtype.itemsize
        assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
        assert len(files) > 1


def test_companions_go_along_and_weights_do_not(saved: Path, tmp_path: Path):
    others = ("tokenizer.json", "merges.txt", "chat_template.jinja", "tokenizer.model", "LICENSE")
    for name in (*others, "README.md", "pytorch_model.bin", "modeling_custom.py"):
        (saved / name).write_text(name)
    target = tmp_path / "copy"
    target.mkdir()
    copy_companions(saved, target, torch.bfloat16)
    expected = {*others, "config.json", "generation_config.json"}
    assert {path.name for path in target.iterdir()} == expected
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path):
    target = tmp_path / "out"
    (tmp_path / ".out.partial").mkdir()  # what a kill leaves
    (tmp_path / ".out.partial" / "stale").touch()
    with pytest.raises(RuntimeError), new_folder(target) as folder:
        (folder / "half").touch()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with new_folder(target) as folder:
        assert not target.exists()
        (folder / "file").touch()
    assert [path.name for path in target.iterdir()] == ["file"]
    with pytest.raises(CheckpointError, match="out: exists already"), new_folder(target):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def _rewrite_index(folder: Path, **changes: str) -> None:
    path = folder / hf_io.INDEX
    index = json.loads(path.read_text())
    index["weight_map"].update(changes)
    path.write_text(json.dumps(index))


def _rewrite_norm(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Put `tensors` where the final norm was, in a file of their own."""
    path = folder / hf_io.INDEX
    index = json.loads(path.read_text())
    del index["weight_map"]["model.norm.weight"]
    index["weight_map"].update(dict.fromkeys(tensors, "new.safetensors"))
    path.write_text(json.dumps(index))
    if tensors:
        save_file(tensors, folder / "new.safetensors")


def _claim_too_much(folder: Path) -> None:
    _rewrite_index(folder, x=HFWeights(folder).location["model.norm.weight"])


def _truncate(folder: Path) -> None:
    path = folder / HFWeights(folder).location["model.norm.weight"]
    path.write_bytes(path.read_bytes()[:-10])


def _only_pickles(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").touch()


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        (_truncate, ".safetensors: not a whole safetensors file"),
        (_only_pickles, "found pytorch_model.bin, and pickles are not read"),
        (
            lambda folder: _rewrite_index(folder, **{NORM: "gone.safetensors"}),
            "gone.safetensors: missing; model.safetensors.index.json names it",
        ),
        (
            lambda folder: _rewrite_index(folder, **{NORM: "../x.safetensors"}),
            "names '../x.safetensors', outside the folder",
        ),
        (_claim_too_much, ".safetensors holds x; it does not"),
        (
            lambda folder: (folder / hf_io.INDEX).write_text("{}"),
            "index.json: not a safetensors index",
        ),
        (
            lambda folder: _rewrite_norm(folder, {}),
            "model: model.norm.weight is missing; Qwen2ForCausalLM of config.json's sizes needs it",
        ),
        (
            lambda folder: _rewrite_norm(folder, {NORM: torch.ones(63)}),
            "new.safetensors: model.norm.weight has shape [63]; config.json says [64]",
        ),
        (
            lambda folder: _rewrite_norm(folder, {NORM: torch.ones(64, dtype=torch.int8)}),
            "new.safetensors: model.norm.weight has dtype I8; expected one of F32, BF16, F16",
        ),
        (
            lambda folder: _rewrite_norm(folder, {NORM: torch.ones(64), "extra": torch.ones(1)}),
            "new.safetensors: unexpected tensor extra; Qwen2ForCausalLM",
        ),
    ],
)
def test_refusals_name_file_and_tensor(breakage, message: str, saved: Path):
    breakage(saved)
    with pytest.raises(CheckpointError) as error:
        HFWeights(saved).check(read_architecture(saved))
    assert message in str(error.value)


def test_known_extras_are_left_aside(tmp_path: Path):
    """Old Llama files carry rotary buffers, and some tied models a head nobody reads."""
    model = save_tiny_model("llama", tmp_path, tie=True, num_hidden_layers=1)
    path = tmp_path / hf_io.SINGLE
    extras = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "lm_head.weight": torch.zeros_like(model.get_input_embeddings().weight),
    }
    save_file({**load_file(path), **extras}, path)
    HFWeights(tmp_path).check(read_architecture(tmp_path))
