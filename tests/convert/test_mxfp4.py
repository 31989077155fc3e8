"""Conversion of a folder in the form of gpt-oss': shards, experts in mxfp4, the rest in bf16.

The reference is transformers' own dequantization.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from aropd_mcore.convert import mxfp4
from aropd_mcore.convert.architecture import CheckpointError
from aropd_mcore.convert.hf_io import INDEX, HFWeights
from aropd_mcore.convert.import_export import export_hf, import_hf
from aropd_mcore.convert.source import HFSource, MegatronSource
from aropd_mcore.convert.verify import verify
from tests.support.tiny_models import TINY, save_tiny_model

EXPERTS, HIDDEN, FFN = 4, TINY["hidden_size"], TINY["intermediate_size"]
PACKED = {"gate_up_proj": (2 * FFN, HIDDEN), "down_proj": (HIDDEN, FFN)}
"""Rows and columns of the weights of an expert."""
QUANTIZATION = {
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
    "quant_method": "mxfp4",
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "model"
    save_tiny_model("gpt_oss", folder, dtype=torch.bfloat16, num_hidden_layers=2)
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in whole if name.endswith(tuple(PACKED))]:
        rows, columns = PACKED[name.rpartition(".")[2]]
        sizes = EXPERTS, rows, columns // 32
        del whole[name]
        whole[f"{name}_blocks"] = torch.randint(
            0, 256, (*sizes, 16), generator=generator, dtype=torch.uint8
        )
        # 2^-10 to 2^-2; and one block at each end of the scales that gpt-oss may have.
        scales = torch.randint(117, 126, sizes, generator=generator, dtype=torch.uint8)
        scales[0, 0, 0], scales[1, 2, 1] = 0, 254
        whole[f"{name}_scales"] = scales
    names = sorted(whole)
    shards = [names[0::3], names[1::3], names[2::3]]  # blocks and scales in different files
    files = {n: f"model-{i:05}-of-00003.safetensors" for i, s in enumerate(shards) for n in s}
    for file in sorted(set(files.values())):
        part = {name: whole[name] for name in names if files[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    for key in ("dtype", "swiglu_alpha"):
        del config[key]
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    config |= {"experts_per_token": 2, "quantization_config": QUANTIZATION}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def stored(folder: Path) -> dict[str, Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def test_import_and_export_give_the_weights_of_transformers_in_bf16(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shapes, dequantize = [], mxfp4.dequantize

    def record(blocks: Tensor, scales: Tensor) -> Tensor:
        shapes.append(tuple(blocks.shape))
        return dequantize(blocks, scales)

    monkeypatch.setattr(mxfp4, "dequantize", record)
    source = HFSource(hub)
    import_hf(source, tmp_path / "megatron")
    one_expert = {(rows, columns // 32, 16) for rows, columns in PACKED.values()}
    assert set(shapes) == one_expert and len(shapes) == 2 * 2 * EXPERTS, "one expert at a time"

    megatron = MegatronSource(tmp_path / "megatron", tmp_path / "megatron" / "iter_0000000")
    assert verify(source, megatron).same
    export_hf(megatron, tmp_path / "back")
    quantized, expected = stored(hub), {}
    for name, tensor in quantized.items():
        if name.endswith(mxfp4.BLOCKS):
            plain = name.removesuffix(mxfp4.BLOCKS)
            scales = quantized[plain + mxfp4.SCALES]
            expected[plain] = convert_moe_packed_tensors(tensor, scales)
        elif not name.endswith(mxfp4.SCALES):
            expected[name] = tensor
    actual = stored(tmp_path / "back")
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == torch.bfloat16
        assert torch.equal(actual[name], tensor), name
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config.pop("dtype") == "bfloat16"
    original = json.loads((hub / "config.json").read_text())
    assert original.pop("quantization_config") and config == original
    assert verify(source, HFSource(tmp_path / "back")).same


def folder_with(hub: Path, folder: Path, changed: dict[str, Tensor], **config: object) -> Path:
    """Copy the folder in one file, with other tensors and other keys of config.json."""
    save_file(stored(hub) | changed, folder / "model.safetensors")
    keys = json.loads((hub / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(keys))
    return folder


BLOCKS = "model.layers.0.mlp.experts.down_proj_blocks"


@pytest.mark.parametrize(
    ("changed", "config", "message"),
    [
        (
            {BLOCKS: torch.zeros(4, 64, 3, 8, dtype=torch.uint8)},
            {},
            r"_blocks has shape \[4, 64, 3",
        ),
        (
            {BLOCKS: torch.zeros(4, 64, 3, 16)},
            {},
            "_blocks has dtype torch.float32; expected bytes",
        ),
        (
            {"lm_head.weight": torch.zeros(509, 64, dtype=torch.uint8)},
            {},
            "lm_head.weight has dtype torch.uint8; expected fp32",
        ),
        ({}, {"quantization_config": None}, "has dtype U8; expected one of F32, BF16, F16"),
        (
            {},
            {"quantization_config": {"quant_method": "awq"}},
            r"quantization_config declares quantized weights \(awq\)",
        ),
        ({}, {"intermediate_size": 80}, "down_proj has 80 columns .* a multiple of 32 for mxfp4"),
    ],
)
def test_folders_that_are_not_mxfp4_are_refused(
    hub: Path, tmp_path: Path, changed: dict[str, Tensor], config: dict[str, object], message: str
):
    with pytest.raises(CheckpointError, match=message):
        HFSource(folder_with(hub, tmp_path, changed, **config))


def test_quantized_weights_of_other_families_are_refused(tmp_path: Path):
    save_tiny_model("mixtral", tmp_path, num_hidden_layers=1)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"quantization_config": QUANTIZATION})
    )
    with pytest.raises(CheckpointError, match=r"declares quantized weights \(mxfp4\)"):
        HFSource(tmp_path)


def test_order_of_stacked_tensors_is_kept(tmp_path: Path):
    save_tiny_model("gpt_oss", tmp_path / "hf", max_shard_size="100KB")
    import_hf(HFSource(tmp_path / "hf"), tmp_path / "megatron")
    megatron = MegatronSource(tmp_path / "megatron", tmp_path / "megatron" / "iter_0000000")
    export_hf(megatron, tmp_path / "back")
    original, back = HFWeights(tmp_path / "hf"), HFWeights(tmp_path / "back")
    assert list(back.tensors) == list(original.tensors)
    for name in original.tensors:
        assert torch.equal(back.read(name), original.read(name)), name
