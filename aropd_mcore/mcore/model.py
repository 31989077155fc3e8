"""Construction of this rank's shard of Megatron's GPTModel from an HF config.json."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import RowParallelLinear, scatter_to_sequence_parallel_region
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from aropd_mcore.config import PrecisionConfig, Recompute
from aropd_mcore.convert.architecture import (
    Architecture,
    check_layout,
    read_architecture,
)
from aropd_mcore.convert.tensors import padded_vocab_size
from aropd_mcore.mcore.latent_attention import LatentRope
from aropd_mcore.mcore.layer_specs import block_spec
from aropd_mcore.mcore.model_config import BF16, model_config
from aropd_mcore.mcore.patches import group_ranking
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.stages import Stages

if TYPE_CHECKING:
    from aropd_mcore.mcore.adapter import Adapters

ADAPTER = "adapter."
"""Start of the names of an adapter's parameters, within a chunk."""

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
        *,
        has_head: bool = True,
    ):
        padded = padded_vocab_size(architecture.vocab_size, runtime.tp_size)
        super().__init__(
            config,
            block_spec(architecture, config, runtime, vp_stage),  # type: ignore[arg-type] # a spec of a block
            vocab_size=padded,
            max_sequence_length=architecture.max_tokens(runtime.cp_size),
            pre_process=runtime.is_first_stage and vp_stage in (None, 0),
            post_process=runtime.is_last_stage and vp_stage in (None, runtime.vp_size - 1),
            share_embeddings_and_output_weights=architecture.tied_embeddings,
            position_embedding_type="rope",
            vp_stage=vp_stage,
        )
        if self.post_process and not has_head:
            del self.output_layer
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
        self.adapters: Adapters | None = None
        """Adapter that is trained in place of the weights; see mcore.adapter."""

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
        model. Therefore any layout can read the checkpoint. Of a model with an adapter, the state
        is `{"adapter": the adapter's tensors}`.
        """
        if self.adapters is not None:
            return {"adapter": self.adapters.sharded_state_dict("trained", prefix)}
        return {
            str(index): chunk.sharded_state_dict(prefix=prefix, metadata=metadata)
            for index, chunk in enumerate(self)
        }


def build_model(
    hf: Path | str | Mapping[str, Any] | Architecture,
    runtime: Runtime,
    *,
    dtype: torch.dtype,
    recompute: Recompute = "none",
    precision: PrecisionConfig = BF16,
    stages: Stages | None = None,
    has_head: bool = True,
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
        has_head: whether the last stage holds the output head.
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
    with runtime.active():
        chunks = [
            HiddenStateGPT(architecture, config, runtime, stage, has_head=has_head)
            for stage in vp_stages
        ]
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
