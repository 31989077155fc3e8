"""FP8 through Transformer Engine: Megatron's settings, and whether this machine can do it."""

from typing import Any

import torch
from megatron.core import fp8_utils
from megatron.core.extensions.transformer_engine import HAVE_TE

from aropd_mcore.config import ConfigError, PrecisionConfig


def fp8_settings(precision: PrecisionConfig) -> dict[str, Any]:
    """For a TransformerConfig; nothing in bf16."""
    if precision.fp8 is None:
        return {}
    return {
        "fp8": precision.fp8,
        "fp8_recipe": precision.fp8_recipe,
        "first_last_layers_bf16": precision.bf16_first_layers + precision.bf16_last_layers > 0,
        "num_layers_at_start_in_bf16": precision.bf16_first_layers,
        "num_layers_at_end_in_bf16": precision.bf16_last_layers,
    }


def check_fp8(precision: PrecisionConfig) -> None:
    """Refuse FP8 where it cannot run: on this machine, with what is installed.

    Raises:
        ConfigError: what is missing: a GPU, Transformer Engine, or a GPU that has the format.
    """
    if not precision.has_fp8:
        return
    asked = f"precision.fp8 {precision.fp8 or precision.of_teacher.fp8}"
    if not torch.cuda.is_available():
        raise ConfigError(f"{asked} needs a GPU, and torch sees none on this machine")
    if not HAVE_TE:
        raise ConfigError(
            f"{asked} needs Transformer Engine, which is not installed; "
            "pip install 'aropd-mcore[gpu]'"
        )
    # Transformer Engine has moved it; Megatron knows where it is.
    state = fp8_utils.FP8GlobalStateManager
    is_available = {
        "tensorwise": state.is_fp8_available,
        "delayed": state.is_fp8_available,
        "blockwise": state.is_fp8_block_scaling_available,
        "mxfp8": state.is_mxfp8_available,
    }[precision.fp8_recipe]
    available, reason = is_available()
    if not available:
        name = torch.cuda.get_device_name()
        raise ConfigError(
            f"{asked} with fp8_recipe {precision.fp8_recipe} cannot run on this {name}: {reason}"
        )
