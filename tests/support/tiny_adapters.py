"""Random LoRA adapters in PEFT's format, written and read without the package."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

PREFIX = "base_model.model."


def write_adapter(
    folder: Path,
    model: Path,
    *,
    targets: Sequence[str],
    rank: int = 4,
    alpha: float = 8.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Path:
    """Write an adapter of the model in an HF folder, with random A and B.

    Args:
        settings: further keys of adapter_config.json.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    with safe_open(model / "model.safetensors", "pt") as file:
        for name in sorted(file.keys()):
            module = name.removesuffix(".weight")
            if module.rpartition(".")[2] not in targets:
                continue
            outputs, inputs = file.get_slice(name).get_shape()
            shapes = {"lora_A": (rank, inputs), "lora_B": (outputs, rank)}
            for part, shape in shapes.items():
                values = torch.randn(shape, generator=generator) / math.sqrt(shape[1])
                scale = 0.2 if part == "lora_B" else 1.0
                tensors[f"{PREFIX}{module}.{part}.weight"] = (scale * values).to(dtype)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(targets),
        "lora_dropout": 0.0,
        "bias": "none",
        **settings,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def read_adapter(folder: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """Read A and B of each linear layer by its name, in fp64, and the scale alpha / rank."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    pairs = {}
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            b = tensors[name.replace("lora_A", "lora_B")]
            module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            pairs[module] = (a.double(), b.double())
    return pairs, config["lora_alpha"] / config["r"]
