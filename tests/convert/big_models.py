"""HF folders of any size with random bits, written fast, without a model in memory."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from aropd_mcore.convert.architecture import Architecture, read_architecture
from aropd_mcore.convert.hf_write import SafetensorsWriter
from aropd_mcore.convert.mxfp4 import packed_shapes
from aropd_mcore.convert.tensor_bytes import TensorInfo
from tests.support.tiny_models import FAMILIES, tiny_config


def write_llama(
    folder: Path,
    *,
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    vocab_size: int = 1000,
    sparse: bool = False,
    max_shard_bytes: int = 5 * 10**9,
) -> int:
    """Write a bf16 model with 8 heads. Returns its size in bytes.

    Args:
        sparse: write headers only, and extend the files to their lengths without using disk space.
    """
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "max_position_embeddings": 4096,
        "num_attention_heads": 8,
        "num_hidden_layers": num_hidden_layers,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "vocab_size": vocab_size,
    }
    if sparse:
        return write_sparse(folder, config, max_shard_bytes=max_shard_bytes)
    writer, infos = _begin(folder, config, max_shard_bytes)
    largest = max(info.num_bytes for info in infos.values()) // 2
    bits = torch.randint(-(2**15), 2**15, (largest + 1000,), dtype=torch.int16)
    with writer:
        for number, (name, info) in enumerate(infos.items()):
            own = bits[number % 1000 :][: info.num_bytes // 2]  # each tensor has another start
            writer.write(name, own.view(torch.bfloat16).view(info.shape))
    return sum(info.num_bytes for info in infos.values())


def write_sparse(folder: Path, config: dict[str, Any], *, max_shard_bytes: int = 5 * 10**9) -> int:
    """Write config.json and the headers of bf16 weights, whose values take no disk space.

    Returns:
        The size of the weights in bytes.
    """
    _, infos = _begin(folder, config, max_shard_bytes)
    for path in folder.glob("*.safetensors"):
        _lengthen(path)
    return sum(info.num_bytes for info in infos.values())


def _begin(
    folder: Path, config: dict[str, Any], max_shard_bytes: int
) -> tuple[SafetensorsWriter, dict[str, TensorInfo]]:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    shapes = read_architecture(config).hf_shapes
    infos = {name: TensorInfo(torch.bfloat16, shape) for name, shape in shapes.items()}
    return SafetensorsWriter(folder, infos, max_shard_bytes=max_shard_bytes), infos


def _lengthen(path: Path) -> None:
    """Extend a file that consists of a header to the length that the header describes."""
    content = path.read_bytes()
    header = json.loads(content[8:])
    end = max(entry["data_offsets"][1] for entry in header.values() if "data_offsets" in entry)
    with path.open("r+b") as file:
        file.truncate(len(content) + end)


def write_fp8(folder: Path, **sizes: int) -> int:
    """Write a DeepSeek-V3 model with FP8 weights and a scale per block of 128 x 128.

    Args:
        sizes: keys of config.json that replace those of the tiny model.
    Returns:
        The size of the weights in bytes after dequantization to bf16.
    """
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    architecture = _write_config(folder, "deepseek_v3", quantization, sizes)
    tensors: dict[str, Tensor] = {}
    for name, info in architecture.hf_infos(torch.bfloat16).items():
        if len(info.shape) < 2 or name.endswith(("embed_tokens.weight", "lm_head.weight")):
            tensors[name] = torch.randn(info.shape).to(info.dtype)
            continue
        positive = torch.randint(0, 0x7F, info.shape, dtype=torch.uint8)  # no NaN
        tensors[name] = positive.view(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.rand([-(-size // 128) for size in info.shape])
    save_file(tensors, folder / "model.safetensors")
    return 2 * architecture.num_parameters


def write_mxfp4(folder: Path, **sizes: int) -> int:
    """Write a gpt-oss model with experts in mxfp4. Arguments and result are those of write_fp8."""
    architecture = _write_config(folder, "gpt_oss", {"quant_method": "mxfp4"}, sizes)
    shapes = packed_shapes(architecture.file_shapes, architecture.elements.values(), folder)
    tensors = {}
    for name, shape in shapes.items():
        if name.endswith("_blocks"):
            tensors[name] = torch.randint(0, 256, shape, dtype=torch.uint8)
        elif name.endswith("_scales"):
            tensors[name] = torch.randint(117, 126, shape, dtype=torch.uint8)
        else:
            tensors[name] = torch.randn(shape).bfloat16()
    save_file(tensors, folder / "model.safetensors")
    return 2 * architecture.num_parameters


def _write_config(
    folder: Path, family: str, quantization: dict[str, Any], sizes: dict[str, int]
) -> Architecture:
    config = tiny_config(family, **sizes).to_dict()
    config |= {
        "architectures": [FAMILIES[family][1].__name__],
        "dtype": "bfloat16",
        "quantization_config": quantization,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return read_architecture(config)
