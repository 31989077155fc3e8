"""FP8 through Transformer Engine: Megatron's settings, and a check of this machine."""

from typing import Any

import torch
from megatron.core import fp8_utils
from megatron.core.extensions.transformer_engine import HAVE_TE

from aropd_mcore.config import ConfigError, PrecisionConfig


def fp8_settings(precision: PrecisionConfig) -> dict[str, Any]:
    """Return the FP8 settings of a TransformerConfig. Empty without FP8."""
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
    """Check that this machine and the installed packages can run the FP8 settings.

    Raises:
        ConfigError: there is no GPU, Transformer Engine is not installed, or the GPU lacks the
            format.
    """
    if not precision.has_fp8:
        return
    setting = f"precision.fp8 {precision.fp8 or precision.for_teacher.fp8}"
    if not torch.cuda.is_available():
        raise ConfigError(f"{setting} needs a GPU, and torch finds none on this machine")
    if not HAVE_TE:
        raise ConfigError(
            f"{setting} needs Transformer Engine, which is not installed; "
            "run pip install 'aropd-mcore[gpu]'"
        )
    # Transformer Engine has moved this class. Megatron imports it from the right place.
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
            f"{setting} with fp8_recipe {precision.fp8_recipe} cannot run on this {name}: {reason}"
        )
