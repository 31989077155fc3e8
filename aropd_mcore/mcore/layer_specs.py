"""Megatron's specs of the layers of a chunk: which module computes each part."""

from typing import Any

from megatron.core.extensions.transformer_engine import HAVE_TE, TEColumnParallelGroupedLinear
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    LayerNormImpl,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from aropd_mcore.convert.architecture import Architecture
from aropd_mcore.mcore.latent_attention import use_latent_attention
from aropd_mcore.mcore.patches.local_attention import LocalCoreAttention
from aropd_mcore.mcore.patches.local_norm import LocalRMSNorm
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.mcore.whole_norm import WholeNormAttention


def use_transformer_engine(runtime: Runtime) -> bool:
    """Return whether layers are Transformer Engine's; else they are Megatron's local ones."""
    return HAVE_TE and runtime.device.type == "cuda"


def has_grouped_experts(fused: bool) -> bool:
    """Return whether one grouped product computes all experts of a rank."""
    return fused and TEColumnParallelGroupedLinear is not None


def block_spec(
    architecture: Architecture, config: TransformerConfig, runtime: Runtime, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """Return the specs of the layers of this rank's chunk, with experts or with a dense MLP.

    Args:
        config: the result of model_config.model_config for this architecture and runtime.
        vp_stage: number of the chunk on this stage. None: the stage has one chunk.
    """
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    layers = range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage))
    specs = [
        _layer_spec(architecture, config, runtime, experts=architecture.has_experts(layer))
        for layer in layers
    ]
    norm = LayerNormImpl if use_transformer_engine(runtime) else LocalRMSNorm
    return TransformerBlockSubmodules(
        layer_specs=specs,
        layer_norm=norm,  # type: ignore[arg-type] # a class, as everywhere in specs
    )


def _layer_spec(
    architecture: Architecture, config: TransformerConfig, runtime: Runtime, *, experts: bool
) -> ModuleSpec:
    kwargs: dict[str, Any] = {
        "num_experts": config.num_moe_experts if experts else None,
        "moe_grouped_gemm": config.moe_grouped_gemm if experts else False,
        "qk_layernorm": config.qk_layernorm,
        "multi_latent_attention": architecture.latent is not None,
    }
    is_local = not use_transformer_engine(runtime)
    if is_local:
        spec = get_gpt_layer_local_spec(**kwargs, normalization=config.normalization)
    else:
        spec = get_gpt_layer_with_transformer_engine_spec(**kwargs)
    layer: Any = spec.submodules
    attention: Any = layer.self_attention.submodules
    if architecture.latent:
        use_latent_attention(layer, experts=experts, is_local=is_local)
    elif architecture.has_whole_qk_norm:
        layer.self_attention.module = WholeNormAttention
    elif is_local and config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = LocalRMSNorm
    if is_local or architecture.has_sinks:
        attention.core_attention = LocalCoreAttention
    if not is_local:
        return spec
    layer.input_layernorm = layer.pre_mlp_layernorm = LocalRMSNorm
    if experts and not architecture.latent:
        # In checkpoints, the local spec gives norms the names of Transformer Engine's spec, which
        # fuses them into the next linear layer. Before experts Transformer Engine's spec fuses
        # nothing and keeps the plain name, but the local spec renames that norm too. Undo this, so
        # that both specs read the same checkpoints.
        layer.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.")
    return spec
