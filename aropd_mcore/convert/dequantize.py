"""FP8 weights with one scale per block, as DeepSeek-V3 is published, read as bf16.

A weight W in float8_e4m3fn has its scales in a tensor of the name of W with `_scale_inv` at the
end. Element (i, j) has the value W[i, j] * scale[i // rows, j // columns], computed in fp32 and
rounded to bf16, with blocks of `weight_block_size` rows and columns.
"""

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from aropd_mcore.convert.json_file import CheckpointError, JsonObject, brief
from aropd_mcore.convert.tensor_bytes import Buffer, TensorInfo

FP8 = torch.float8_e4m3fn
FP8_NAME = "F8_E4M3"
"""Name of the dtype in safetensors files."""
SCALE_SUFFIX = "_scale_inv"
Block = tuple[int, int]
Quantization = Block | str
"""Rows and columns of the blocks of FP8 weights, or the name of another method."""


def read_quantization(config: JsonObject, methods: Collection[str]) -> Quantization | None:
    """Read how the weights of a config.json are quantized. None: they are not.

    Args:
        methods: values of `quant_method` besides fp8 that the family's weights may have.
    Raises:
        CheckpointError: the weights are quantized in another way.
    """
    for key in ("quantization_config", "compression_config"):
        quantization = config.get(key)
        if quantization is None:
            continue
        method = quantization.get("quant_method", "an unnamed method")
        block = quantization.get("weight_block_size")
        is_fp8 = method == "fp8" and quantization.get("fmt", "e4m3") == "e4m3"
        if key == "quantization_config" and method in methods:
            return method
        if key != "quantization_config" or not is_fp8 or not _is_block(block):
            raise config.error(
                f"{key} declares quantized weights ({method}); expected fp32, bf16 or fp16 "
                "weights, or fp8 in the format e4m3 with a weight_block_size such as [128, 128], "
                f"not {brief(block)}: use the checkpoint before quantization"
            )
        return block[0], block[1]
    return None


def _is_block(block: object) -> bool:
    return (
        isinstance(block, list)
        and len(block) == 2
        and all(type(size) is int and size > 0 for size in block)
    )


def check_scales(
    where: str, name: str, infos: Mapping[str, TensorInfo], scales: TensorInfo | None, block: Block
) -> None:
    """Check a weight in FP8, or a weight that has scales.

    Args:
        where: name of the file, for errors.
        scales: dtype and shape of the scales. None: the weight has none.
    Raises:
        CheckpointError: it has no scales, is not in FP8, or the shapes do not match.
    """
    info = infos[name]
    if scales is None:
        raise CheckpointError(
            f"{where}: {name} is in FP8 and {name}{SCALE_SUFFIX} is missing; expected its scales"
        )
    if info.dtype != FP8 or len(info.shape) != 2:
        raise CheckpointError(
            f"{where}: {name} is {info.dtype} of shape {list(info.shape)} and has scales; expected "
            "a matrix in FP8"
        )
    expected = tuple(map(math.ceil, (info.shape[0] / block[0], info.shape[1] / block[1])))
    if scales.shape != expected or scales.dtype not in (torch.float32, torch.bfloat16):
        raise CheckpointError(
            f"{where}: {name}{SCALE_SUFFIX} is {scales.dtype} of shape {list(scales.shape)}; "
            f"expected fp32 or bf16 of shape {list(expected)} by weight_block_size {list(block)}"
        )


def dequantize(
    values: Tensor, scales: Tensor, start: tuple[int, int], block: Block, buffer: Buffer
) -> Tensor:
    """Return a part of a weight in bf16, in the buffer's memory.

    Args:
        values: part of the weight, float8_e4m3fn [rows, columns].
        scales: scales of the whole weight.
        start: row and column at which the part starts.
    """
    out = buffer.take(values.shape, torch.bfloat16)
    num_rows, num_columns = values.shape
    scale_columns = (torch.arange(num_columns) + start[1]) // block[1]
    row = 0
    while row < num_rows:  # the rows of one block at a time, since fp32 needs four times the memory
        number = (start[0] + row) // block[0]
        end = min((number + 1) * block[0] - start[0], num_rows)
        out[row:end] = values[row:end].float() * scales[number].float()[scale_columns]
        row = end
    return out
