"""HF folders of any size with Llama's names and random bits, written fast, without transformers."""

import json
from pathlib import Path
from typing import Any

import torch

from aropd_mcore.convert.architecture import read_architecture
from aropd_mcore.convert.hf_write import SafetensorsWriter
from aropd_mcore.convert.tensor_bytes import TensorInfo


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
