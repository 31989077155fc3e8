"""Conversion of a folder in the form of GLM-4.5's: shards, bf16 with fp32 biases, and layers that
predict further tokens."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from aropd_mcore.cli.convert import untrained_text
from aropd_mcore.convert.architecture import CheckpointError
from aropd_mcore.convert.hf_io import INDEX, HFWeights
from aropd_mcore.convert.import_export import export_hf, import_hf, keep_companions
from aropd_mcore.convert.inspect import inspect
from aropd_mcore.convert.source import HFSource, MegatronSource
from aropd_mcore.convert.verify import verify
from tests.support.tiny_models import FP32_BUFFER, save_tiny_model

EXTRA = {
    "model.layers.4.eh_proj.weight": torch.randn(64, 128).bfloat16(),
    "model.layers.4.mlp.gate.e_score_correction_bias": torch.randn(8),
    "model.layers.4.shared_head.norm.weight": torch.randn(64).bfloat16(),
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """Return a folder whose last shard has the tensors of the layer after the last one."""
    folder = tmp_path_factory.mktemp("hub") / "model"
    save_tiny_model("glm4_moe", folder, dtype=torch.bfloat16, max_shard_size="200KB")
    index = json.loads((folder / INDEX).read_text())
    shard = sorted(set(index["weight_map"].values()))[-1]
    save_file(load_file(folder / shard) | EXTRA, folder / shard, metadata={"format": "pt"})
    index["weight_map"] |= dict.fromkeys(EXTRA, shard)
    (folder / INDEX).write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    config.pop("num_mtp_layers", None)
    config["num_nextn_predict_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_export_of_an_import_equals_the_folder_with_all_its_tensors(hub: Path, tmp_path: Path):
    source = HFSource(hub)
    assert sorted(source.untrained) == sorted(EXTRA) and not source.left_aside
    dtypes = {n: info.dtype for n, info in source.tensors.items() if n.endswith(FP32_BUFFER)}
    assert set(dtypes.values()) == {torch.float32} and len(dtypes) == 3, "layer 0 is dense"
    import_hf(source, tmp_path / "megatron")
    megatron = MegatronSource(tmp_path / "megatron", tmp_path / "megatron" / "iter_0000000")
    export_hf(megatron, tmp_path / "back")
    back = HFSource(tmp_path / "back")
    assert verify(source, back).same and verify(source, megatron).same
    assert list(HFWeights(tmp_path / "back").tensors) == list(HFWeights(hub).tensors)
    for name, tensor in EXTRA.items():
        assert (
            torch.equal(back.files.read(name), tensor)
            and tensor.dtype == back.untrained[name].dtype
        )
    assert sorted(inspect(tmp_path / "megatron").untrained) == sorted(EXTRA)
    text = untrained_text(sorted(EXTRA))
    assert text == "3 tensors that predict further tokens (model.layers.4)"

    export_hf(megatron, tmp_path / "fp32", dtype=torch.float32)
    fp32 = HFSource(tmp_path / "fp32")
    assert {info.dtype for info in fp32.tensors.values()} == {torch.float32}
    assert fp32.untrained == source.untrained, "tensors that are only kept have their own dtypes"
    assert fp32.config.dtype == "float32"


def test_verify_compares_tensors_that_are_only_kept(hub: Path, tmp_path: Path):
    keep_companions(HFSource(hub), tmp_path / "hf")
    import_hf(HFSource(hub), tmp_path / "megatron")
    kept = tmp_path / "megatron" / "hf" / "untrained" / "model.safetensors"
    assert kept.read_bytes() == (tmp_path / "hf" / "untrained" / "model.safetensors").read_bytes()
    changed = load_file(kept)
    changed["model.layers.4.shared_head.norm.weight"] += 1
    save_file(changed, kept)
    other = MegatronSource(tmp_path / "megatron", tmp_path / "megatron" / "iter_0000000")
    report = verify(HFSource(hub), other)
    different = [tensor.name for tensor in report.tensors if not tensor.equal]
    assert different == ["model.layers.4.shared_head.norm.weight"] and not report.same


def test_layers_that_config_json_does_not_state_are_refused(hub: Path, tmp_path: Path):
    config = json.loads((hub / "config.json").read_text()) | {"num_nextn_predict_layers": 0}
    for file in hub.glob("*.safetensors*"):
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"unexpected tensor model\.layers\.4\.eh_proj"):
        HFSource(tmp_path)
