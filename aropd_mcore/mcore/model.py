"""Construction of this rank's shard of Megatron's GPTModel from an HF config.json."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE, TEColumnParallelGroupedLinear
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import RowParallelLinear, scatter_to_sequence_parallel_region
from megatron.core.tensor_parallel import layers as parallel_layers
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    LayerNormImpl,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor
from torch.nn import functional

from aropd_mcore.config import PrecisionConfig, Recompute
from aropd_mcore.convert.architecture import (
    Architecture,
    check_layout,
    read_architecture,
)
from aropd_mcore.convert.routing import Routing
from aropd_mcore.convert.tensors import padded_vocab_size
from aropd_mcore.mcore.fp8 import fp8_settings
from aropd_mcore.mcore.latent_attention import LatentRope, latent_settings, use_latent_attention
from aropd_mcore.mcore.patches import group_ranking
from aropd_mcore.mcore.patches.local_attention import LocalCoreAttention
from aropd_mcore.mcore.patches.local_norm import LocalRMSNorm
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.mcore.whole_norm import WholeRMSNorm
from aropd_mcore.stages import Stages

BF16 = PrecisionConfig()
"""Precision settings without FP8."""

_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    # Layer by layer: only each layer's input is kept.
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}

group_ranking.install()
if not hasattr(moe_utils, "te_general_gemm"):
    # The router compares this name with None (transformer/moe/moe_utils.py:1192). megatron-core
    # 0.16.1 defines the name only if Transformer Engine is installed.
    moe_utils.te_general_gemm = None  # type: ignore[assignment]


class HiddenStateGPT(GPTModel):
    """GPTModel whose last stage returns final hidden states instead of logits.

    The arguments are GPTModel's: tokens [B, S], positions [B, S], and an attention mask or None for
    causal attention. A StaticInferenceContext makes it decode with a cache. Every stage returns
    [S, B, H], or under sequence parallelism this tensor rank's [S / tp, B, H]. The last stage
    returns its output after the final norm. The loss and the sampler apply the output head, chunk
    by chunk, so no [S, B, V] tensor is made here.
    """

    def __init__(
        self,
        architecture: Architecture,
        config: TransformerConfig,
        runtime: Runtime,
        vp_stage: int | None = None,
    ):
        padded = padded_vocab_size(architecture.vocab_size, runtime.tp_size)
        super().__init__(
            config,
            _block_spec(architecture, config, runtime, vp_stage),  # type: ignore[arg-type] # this too
            vocab_size=padded,
            max_sequence_length=architecture.max_tokens(runtime.cp_size),
            pre_process=runtime.is_first_stage and vp_stage in (None, 0),
            post_process=runtime.is_last_stage and vp_stage in (None, runtime.vp_size - 1),
            share_embeddings_and_output_weights=architecture.tied_embeddings,
            position_embedding_type="rope",
            vp_stage=vp_stage,
        )
        if architecture.latent:
            self.rotary_pos_emb = LatentRope(architecture.rope.dim, 1.0, cp_group=runtime.cp_group)
            layers: list[Any] = list(self.decoder.layers)
            for layer in layers:
                layer.self_attention.rotary_pos_emb = self.rotary_pos_emb
        # Megatron computes the frequencies of some ropes itself, in another way than transformers.
        self.rotary_pos_emb.inv_freq = architecture.rope.frequencies().to(runtime.device)
        self.architecture = architecture
        self.vocab_size = architecture.vocab_size
        self.padded_vocab_size = padded

    def _preprocess(self, *args: Any, padding_mask: Tensor | None = None, **kwargs: Any) -> Any:
        # GPTModel splits the mask over tensor ranks only on the stage that embeds the tokens. Later
        # stages get the whole mask (models/gpt/gpt_model.py, _preprocess), so it is split here.
        split_here = self.config.sequence_parallel and not self.pre_process
        if padding_mask is not None and split_here:
            local_SB = scatter_to_sequence_parallel_region(padding_mask.T.contiguous())
            padding_mask = local_SB.T.contiguous()
        return super()._preprocess(*args, padding_mask=padding_mask, **kwargs)

    def _postprocess(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return hidden_states

    def head_weight(self) -> Tensor:
        """Return this rank's shard of the output head, [V_padded / tp, H]. Last stage only.

        A tied head is the embedding itself if this stage holds the embedding. Rows from vocab_size
        on belong to no token.
        """
        embedding = self.share_embeddings_and_output_weights and self.pre_process
        weight = self.embedding.word_embeddings.weight if embedding else self.output_layer.weight
        assert weight is not None
        return weight


class StageModel(torch.nn.ModuleList):
    """The model chunks of this rank's pipeline stage: one, or several if interleaved.

    A token passes chunk 0 of every stage, then chunk 1 of every stage, and so on. Iteration yields
    the chunks in this order. Parameter names begin with the chunk: `0.decoder.layers.0...`.
    """

    def __init__(
        self,
        architecture: Architecture,
        config: TransformerConfig,
        chunks: list[HiddenStateGPT],
        stages: Stages,
    ):
        super().__init__(chunks)
        self.architecture = architecture
        self.config = config
        self.stages = stages
        self.vocab_size = architecture.vocab_size
        """Number of tokens with logits. Rows of the output head from here on belong to no token."""
        self.max_sequence_length = architecture.max_tokens(config.context_parallel_size)

    def __iter__(self) -> Iterator[HiddenStateGPT]:
        return cast(Iterator[HiddenStateGPT], super().__iter__())

    @property
    def layers(self) -> list[Any]:
        """Decoder layers of all chunks, in the order in which a token passes them."""
        return [layer for chunk in self for layer in chunk.decoder.layers]

    def head_weight(self) -> Tensor:
        """Return HiddenStateGPT.head_weight of the last chunk. Last stage only."""
        return cast(HiddenStateGPT, self[-1]).head_weight()

    def sharded_state_dict(self, prefix: str = "", *, metadata: dict[str, Any]) -> dict[str, Any]:
        """Return the state for dist_checkpointing: `{"0": chunk 0's tensors by local name, ...}`.

        A tensor's key in the checkpoint begins with `prefix` and counts layers over the whole
        model. Therefore any layout can read the checkpoint.
        """
        return {
            str(index): chunk.sharded_state_dict(prefix=prefix, metadata=metadata)
            for index, chunk in enumerate(self)
        }


def model_config(
    architecture: Architecture,
    runtime: Runtime,
    *,
    dtype: torch.dtype,
    recompute: Recompute = "none",
    precision: PrecisionConfig = BF16,
    stages: Stages | None = None,
) -> TransformerConfig:
    """Return Megatron's settings for a model and this runtime.

    Fused kernels are enabled if Transformer Engine provides them.

    Args:
        stages: split of the layers. None: runtime.stages.
    """
    fused, has_biases = _use_transformer_engine(runtime), architecture.has_expert_bias
    has_experts = architecture.routing is not None
    config_class = MLATransformerConfig if architecture.latent else TransformerConfig
    return config_class(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_heads,
        num_query_groups=architecture.num_kv_heads,
        kv_channels=architecture.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.rms_norm_eps,
        gated_linear_unit=True,
        **_mlp_settings(architecture.routing),
        add_bias_linear=architecture.has_output_bias,
        add_qkv_bias=architecture.has_qkv_bias,
        # With this setting, Megatron sums the gradients of the norms over tensor ranks
        # (distributed/finalize_model_grads.py), which divide the weight of a norm over all heads.
        qk_layernorm=architecture.has_qk_norm and not architecture.has_whole_qk_norm,
        **_attention_settings(architecture, runtime),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=runtime.tp_size,
        pipeline_model_parallel_size=runtime.pp_size,
        virtual_pipeline_model_parallel_size=runtime.vp_size if runtime.vp_size > 1 else None,
        pipeline_model_parallel_layout=_pipeline_layout(architecture, stages or runtime.stages),
        expert_model_parallel_size=runtime.ep_size if has_experts else 1,
        expert_tensor_parallel_size=runtime.etp_size,
        sequence_parallel=runtime.sequence_parallel,
        context_parallel_size=runtime.cp_size,
        **_RECOMPUTE[recompute],
        **fp8_settings(precision),
        **(
            _routing_settings(architecture, routing, fused)
            if (routing := architecture.routing)
            else {}
        ),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        # Interleaved stages send each tensor as soon as it is ready. Megatron's default, batched
        # exchange, silently gives wrong data on gloo in that layout.
        overlap_p2p_comm=runtime.vp_size > 1,
        batch_p2p_comm=runtime.vp_size == 1,
        batch_p2p_sync=False,  # a synchronization of the device, for old versions of torch
        bf16=dtype == torch.bfloat16,
        # Microbatches differ in length (see pipeline_hops). Megatron then requires this dispatcher,
        # even for dense models.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        # The loss is a sum. numerics.reduce divides it.
        calculate_per_token_loss=True,
        use_cpu_initialization=runtime.device.type == "cpu",
        # Weights are loaded later, so initial values do not matter. Initialization must still run:
        # it marks the tensor-parallel weights, and without the marks the gradient norm counts them
        # on the first tensor rank only (tensor_parallel/layers.py, ColumnParallelLinear).
        init_method=_keep_uninitialized,
        output_layer_init_method=_keep_uninitialized,
        # Fused with a bias, Megatron clamps before it adds the bias. Grouped experts add it before
        # (fusions/fused_bias_geglu.py, weighted_bias_quick_geglu_impl).
        bias_activation_fusion=fused and (_has_grouped_experts(fused) or not has_biases),
        # Grouped experts with biases do not support this fusion.
        bias_dropout_fusion=fused and not has_biases,
        # Megatron fuses the rope of latent attention only with its own YaRN.
        apply_rope_fusion=fused and not architecture.latent,
        # Apex's product that adds to main_grad, for the local layers. Those of Transformer Engine
        # have their own (mcore.optim).
        gradient_accumulation_fusion=(
            runtime.device.type == "cuda"
            and not fused
            and parallel_layers._grad_accum_fusion_available
        ),
    )


def _pipeline_layout(architecture: Architecture, stages: Stages) -> list[list[str]] | None:
    """Return Megatron's list of the modules of each chunk; None for one stage."""
    if stages.pipeline == 1:
        return None
    layout = [["decoder"] * n for n in stages.chunk_layers(architecture.num_layers)]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout


def _attention_settings(architecture: Architecture, runtime: Runtime) -> dict[str, Any]:
    """Return scale, windows and sinks of attention, and the sizes of latent attention."""
    settings: dict[str, Any] = {}
    if architecture.has_sinks:
        settings["softmax_type"] = "learnable"
    rope, latent = architecture.rope, architecture.latent
    if latent:
        settings |= latent_settings(latent, rope)
    if rope.scaling == "yarn":
        # YaRN multiplies queries and keys by this factor. Both are rotated as a whole, or latent
        # attention multiplies them as a whole.
        factor = rope.attention_factor
        settings["softmax_scale"] = factor**2 / architecture.head_dim**0.5
    windows = architecture.windows
    # Without windows, the limit of Architecture.max_tokens holds.
    if windows is not None and (runtime.cp_size == 1 or architecture.has_sinks):
        settings["window_size"] = (windows.size - 1, 0)
        settings["window_attn_skip_freq"] = [int(has_window) for has_window in windows.layers]
    return settings


def _has_grouped_experts(fused: bool) -> bool:
    return fused and TEColumnParallelGroupedLinear is not None


def _mlp_settings(routing: Routing | None) -> dict[str, Any]:
    """Return the activation of gated linear units."""
    if routing is None or routing.glu_limit is None:
        return {"activation_func": functional.silu}
    return {
        "activation_func": quick_gelu,
        "activation_func_clamp_value": routing.glu_limit,
        "glu_linear_offset": 1.0,
    }


_FUSED_PERMUTATIONS = (
    *("fused_permute", "fused_permute_with_probs", "fused_unpermute"),
    *("fused_sort_chunks_by_index", "fused_sort_chunks_by_index_with_probs"),
)
"""Names in moe_utils, which are None where Transformer Engine is missing or too old."""


def _routing_settings(architecture: Architecture, routing: Routing, fused: bool) -> dict[str, Any]:
    """Return the settings of experts.

    Args:
        fused: use the kernels of Transformer Engine that this machine has: one grouped product for
            all experts of a rank, and a fused permutation of their tokens.
    """
    permutations = [getattr(moe_utils, name, None) for name in _FUSED_PERMUTATIONS]
    settings: dict[str, Any] = {}
    if architecture.has_mixed_layers:
        layers = range(architecture.num_layers)
        settings["moe_layer_freq"] = [int(architecture.has_experts(layer)) for layer in layers]
    if routing.shared_ffn_hidden_size:
        settings["moe_shared_expert_intermediate_size"] = routing.shared_ffn_hidden_size
        settings["moe_shared_expert_gate"] = architecture.has_shared_gate
    if routing.scores == "sigmoid":
        # The scores' bias stays as it is in the checkpoint.
        settings["moe_router_enable_expert_bias"] = True
        settings["moe_router_bias_update_rate"] = 0.0
    if routing.groups:
        settings["moe_router_num_groups"], settings["moe_router_group_topk"] = routing.groups
    return settings | {
        "num_moe_experts": routing.num_experts,
        "moe_router_topk": routing.experts_per_token,
        "moe_ffn_hidden_size": routing.ffn_hidden_size,
        # A softmax over the chosen experts only equals a softmax over all experts that is
        # normalized after the choice.
        "moe_router_pre_softmax": not routing.normalized,
        "moe_router_score_function": routing.scores,
        "moe_router_topk_scaling_factor": routing.scaling if routing.scaling != 1.0 else None,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",  # in bf16, near ties between experts would be rounded
        "moe_grouped_gemm": _has_grouped_experts(fused),
        "moe_permute_fusion": fused and None not in permutations,
    }


def build_model(
    hf: Path | str | Mapping[str, Any] | Architecture,
    runtime: Runtime,
    *,
    dtype: torch.dtype,
    recompute: Recompute = "none",
    precision: PrecisionConfig = BF16,
    stages: Stages | None = None,
) -> StageModel:
    """Build this rank's shard of the model that an HF config describes, on runtime.device.

    Its weights are uninitialized memory. Load them with weights.load_hf_weights or from a
    checkpoint.

    Args:
        hf: an HF folder, a config.json, its parsed contents, or what was read from it.
        dtype: dtype of all parameters and of the activations.
        recompute: the part that the backward computes again: nothing, core attention, or every
            layer.
        precision: precision of the layers' matrix products. fp8.check_fp8 checks that this machine
            supports it.
        stages: split of the layers over the runtime's stages. None: runtime.stages.
    Raises:
        CheckpointError: the config cannot be used.
        ValueError: the runtime's layout does not divide the model. A dense model leaves expert
            ranks, which another model of the job may need, unused.
    Collectives: with tied embeddings and several stages, Megatron's constructor sums the two
        copies of the embedding. Every rank must call this function.
    """
    architecture = hf if isinstance(hf, Architecture) else read_architecture(hf)
    stages = stages or runtime.stages
    check_layout(
        architecture,
        tensor=runtime.tp_size,
        stages=stages,
        expert=runtime.ep_size,
        expert_tensor=runtime.etp_size,
        can_be_dense=True,
    )
    config = model_config(
        architecture, runtime, dtype=dtype, recompute=recompute, precision=precision, stages=stages
    )
    vp_stages = range(runtime.vp_size) if runtime.vp_size > 1 else [None]
    chunks = [HiddenStateGPT(architecture, config, runtime, stage) for stage in vp_stages]
    model = StageModel(architecture, config, chunks, stages)
    _mark_experts(model, runtime)
    _allow_biases_of_experts(model)
    # The local spec creates its norms in fp32 and on the CPU, regardless of params_dtype.
    model.to(device=runtime.device, dtype=dtype)
    for name, buffer in model.named_buffers():
        if name.endswith(".expert_bias"):  # rounded scores would change the choice of experts
            buffer.data = buffer.data.float()
    return model


def _mark_experts(model: StageModel, runtime: Runtime) -> None:
    """Mark on the experts' weights how their gradients are summed and counted in the norm.

    There are two cases:

    - The experts or their matrices are sharded over ranks. Each rank's gradients are its own, and
      all count in the norm. megatron-core 0.16 would count the first tensor rank's only.
    - Every tensor rank has all experts, whole, and sends them its own tokens. Their gradients must
      be summed over tp_group and counted once, like those of the norms' weights. megatron-core 0.16
      treats these weights as split over tensor ranks, and 0.19 gives them a separate optimizer
      (`allreduce` in tensor_parallel/layers.py, ColumnParallelLinear).
    """
    are_sharded = runtime.shares_experts
    for name, weight in model.named_parameters():
        if ".experts." in name:
            weight.allreduce = not are_sharded  # type: ignore[attr-defined]
            weight.tensor_model_parallel = are_sharded  # type: ignore[attr-defined]
            weight.sequence_parallel = (  # type: ignore[attr-defined]
                runtime.sequence_parallel and not are_sharded
            )


def _allow_biases_of_experts(model: StageModel) -> None:
    """Make the outputs of local experts' second layers copies, to which a bias can be added.

    Megatron adds the bias in place (transformer/mlp.py, MLP.forward). Autograd refuses this for the
    output of a custom function, which the local layer returns.
    """
    for name, layer in model.named_modules():
        is_second = ".experts." in name and name.endswith(".linear_fc2")
        if is_second and isinstance(layer, RowParallelLinear) and layer.bias is not None:
            layer.register_forward_hook(
                lambda _layer, _args, result: (result[0].clone(), result[1])
            )


def _keep_uninitialized(weight: Tensor) -> Tensor:
    return weight


def _use_transformer_engine(runtime: Runtime) -> bool:
    return HAVE_TE and runtime.device.type == "cuda"


def _block_spec(
    architecture: Architecture, config: TransformerConfig, runtime: Runtime, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """Return the specs of the layers of this rank's chunk, with experts or with a dense MLP."""
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    layers = range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage))
    specs = [
        _layer_spec(architecture, config, runtime, experts=architecture.has_experts(layer))
        for layer in layers
    ]
    norm = LayerNormImpl if _use_transformer_engine(runtime) else LocalRMSNorm
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
    is_local = not _use_transformer_engine(runtime)
    if is_local:
        spec = get_gpt_layer_local_spec(**kwargs, normalization=config.normalization)
    else:
        spec = get_gpt_layer_with_transformer_engine_spec(**kwargs)
    layer: Any = spec.submodules
    attention: Any = layer.self_attention.submodules
    if architecture.latent:
        use_latent_attention(layer, experts=experts, is_local=is_local)
    elif architecture.has_whole_qk_norm:
        heads = {"q": architecture.num_heads, "k": architecture.num_kv_heads}
        for name, number in heads.items():
            norm = ModuleSpec(
                WholeRMSNorm, params={"num_heads": number, "tp_group": runtime.tp_group}
            )
            setattr(attention, f"{name}_layernorm", norm)
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
