"""Conversion of a folder in the form of DeepSeek-V3's: FP8 weights with a scale per block, shards,
and a layer that predicts further tokens."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from aropd_mcore.convert.architecture import CheckpointError
from aropd_mcore.convert.dequantize import dequantize
from aropd_mcore.convert.hf_io import INDEX
from aropd_mcore.convert.import_export import export_hf, import_hf
from aropd_mcore.convert.mapping import Kind
from aropd_mcore.convert.source import HFSource, MegatronSource
from aropd_mcore.convert.tensor_bytes import Buffer
from aropd_mcore.convert.verify import verify
from tests.support.tiny_models import save_tiny_model

BLOCK = 128
FP8 = torch.float8_e4m3fn
KEPT = ("embed_tokens", "norm", "lm_head", "mlp.gate.", "eh_proj")
"""Parts of the names of tensors that DeepSeek-V3 is published with in bf16 or fp32."""
EXTRA = {
    "model.layers.2.eh_proj.weight": torch.randn(256, 512).bfloat16(),
    "model.layers.2.self_attn.o_proj.weight": torch.randn(256, 128),
}
QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}
O_PROJ = "model.layers.1.self_attn.o_proj.weight"


def per_element(scales: Tensor, shape: torch.Size) -> Tensor:
    repeated = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return repeated[: shape[0], : shape[1]]


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight in FP8, and scales of its blocks that are no powers of two."""
    scales = torch.rand([math.ceil(size / BLOCK) for size in weight.shape]) * 0.01 + 0.005
    return (weight.float() / per_element(scales, weight.shape)).to(FP8), scales


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """Return the folder with FP8, and the same weights computed in bf16."""
    root = tmp_path_factory.mktemp("fp8")
    hub, plain = root / "hub", root / "plain"
    # 256 rows are two blocks, and 200 columns one and a part.
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 200, "num_hidden_layers": 2}
    for folder in (hub, plain):
        save_tiny_model(
            "deepseek_v3", folder, dtype=torch.bfloat16, max_shard_size="500KB", **sizes
        )
    index = json.loads((hub / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    torch.manual_seed(3)
    for shard in shards:
        tensors = load_file(hub / shard) | (EXTRA if shard == shards[-1] else {})
        quantized, computed = {}, {}
        for name, tensor in tensors.items():
            if tensor.dim() < 2 or any(part in name for part in KEPT):
                quantized[name] = computed[name] = tensor
                continue
            quantized[name], scales = quantize(tensor)
            quantized[name + "_scale_inv"] = scales
            product = quantized[name].float() * per_element(scales, tensor.shape)
            computed[name] = product.bfloat16()
        save_file(quantized, hub / shard, metadata={"format": "pt"})
        save_file(computed, plain / shard, metadata={"format": "pt"})
        for folder, saved in ((hub, quantized), (plain, computed)):
            index = json.loads((folder / INDEX).read_text())
            index["weight_map"] |= dict.fromkeys(saved, shard)
            (folder / INDEX).write_text(json.dumps(index))
    for folder in (hub, plain):
        config = json.loads((folder / "config.json").read_text())
        config["num_nextn_predict_layers"] = 1
        config.pop("num_mtp_layers", None)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (hub / "config.json").write_text(
        json.dumps(
            json.loads((hub / "config.json").read_text()) | {"quantization_config": QUANTIZATION}
        )
    )
    return hub, plain


def test_import_and_export_write_the_values_as_bf16(folders: tuple[Path, Path], tmp_path: Path):
    hub, plain = folders
    source = HFSource(hub)
    assert source.config.quantization == (BLOCK, BLOCK) and not source.left_aside
    assert sorted(source.untrained) == sorted(EXTRA)
    assert {str(info.dtype) for info in source.tensors.values()} == {
        "torch.bfloat16",
        "torch.float32",  # the bias of the experts' scores
    }
    assert verify(source, HFSource(plain)).same
    import_hf(source, tmp_path / "megatron", tensor_parallel=4)
    megatron = MegatronSource(tmp_path / "megatron", tmp_path / "megatron" / "iter_0000000")
    export_hf(megatron, tmp_path / "back")
    assert verify(HFSource(tmp_path / "back"), HFSource(plain)).same
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config == json.loads((plain / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto")
    expected = {n: t for file in plain.glob("*.safetensors") for n, t in load_file(file).items()}
    assert torch.equal(loaded.state_dict()[O_PROJ], expected[O_PROJ])


def test_a_rank_reads_its_shard_in_bf16(folders: tuple[Path, Path]):
    hub, plain = (HFSource(folder) for folder in folders)
    kinds = set()
    for weight in hub.architecture.weights():
        for rank in range(4):
            shard = hub.shard(weight, 4, rank)
            assert torch.equal(shard, plain.shard(weight, 4, rank)), weight.name
        kinds.add(weight.kind)
    assert kinds == {Kind.VOCAB, Kind.REPLICATED, Kind.COLUMN, Kind.ROW, Kind.GATE_UP}


def test_blocks_need_not_be_square():
    """Parts of a weight that begin and end inside of blocks of 3 rows and 4 columns."""
    torch.manual_seed(0)
    values, scales = torch.randn(8, 10).to(FP8), torch.rand(3, 3)
    whole = scales.repeat_interleave(3, 0)[:8].repeat_interleave(4, 1)[:, :10] * values.float()
    for top, bottom, left, right in ((0, 8, 0, 10), (2, 7, 0, 10), (0, 8, 3, 9)):
        part = values[top:bottom, left:right]
        actual = dequantize(part, scales, (top, left), (3, 4), Buffer())
        assert torch.equal(actual, whole[top:bottom, left:right].bfloat16())


@pytest.mark.parametrize(
    ("change", "because"),
    [
        (lambda t, s: t.pop(s), f"{O_PROJ} is in FP8 and {O_PROJ}_scale_inv is missing"),
        (
            lambda t, s: t.update({s: torch.ones(1, 1)}),
            r"is torch.float32 of shape \[1, 1\]; expected fp32 or bf16 of shape \[2, 1\]",
        ),
        (lambda t, s: t.update({O_PROJ: t[O_PROJ].bfloat16()}), "has scales; expected a matrix"),
        (lambda t, s: t.update({"x_scale_inv": torch.ones(1, 1)}), "x_scale_inv has no weight x"),
    ],
)
def test_scales_that_do_not_match_are_refused(
    change, because: str, folders: tuple[Path, Path], tmp_path: Path
):
    hub, _ = folders
    tensors = {n: t for file in hub.glob("*.safetensors") for n, t in load_file(file).items()}
    change(tensors, O_PROJ + "_scale_inv")
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((hub / "config.json").read_text())
    with pytest.raises(CheckpointError, match=because):
        HFSource(tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"weight_block_size": None}, {"weight_block_size": [128]}, {"fmt": "e5m2"}],
)
def test_other_formats_of_fp8_are_refused(change: dict, folders: tuple[Path, Path], tmp_path: Path):
    config = json.loads((folders[0] / "config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"quantization_config declares .* \(fp8\); expected"):
        HFSource(tmp_path)
