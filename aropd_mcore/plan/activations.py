"""Activation memory of a transformer layer: tensors saved for the backward, and working sets.

Numbers are bytes of one layer on one rank, for one microbatch. They count what autograd saves,
tensor by tensor. `cpu` is Megatron's local layer spec with this package's core attention, as shown
by `torch.autograd.graph.saved_tensors_hooks`. `gpu` is Transformer Engine's spec, counted after
Korthikanti et al., arXiv:2205.05198, for RMSNorm without dropout, flash attention, a fused SwiGLU,
and norms fused into the linear layer that follows (which keeps the norm's output for the gradient
of its weight). In FP8 a matrix product keeps one byte per number of its input, in addition to the
copies that other operations keep. In a model with experts, every layer is counted as one with
experts.
"""

from dataclasses import dataclass

from aropd_mcore.plan.parameters import adapted_sizes
from aropd_mcore.plan.setup import Setup

FP32 = 4
FP8 = 1
ALIGNMENT = 8
"""Number of dimensions that attention with sinks appends to each head."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a layer on one rank."""

    hidden: int
    q: int
    """Total size of the rank's query heads."""
    kv: int
    """Total size of the rank's key heads, which is also that of its value heads, except with latent
    attention."""
    values: int
    """Total size of the rank's value heads."""
    latents: int
    """Total size of a token's latent vectors; 0 with other attention."""
    ffn: int
    """Columns of a dense MLP on the rank; 0 with experts."""
    heads: int
    kv_heads: int
    experts_per_token: int
    expert_ffn: int
    """Columns of one expert."""
    shared_ffn: int
    """Columns of the shared experts on the rank."""
    tokens: float
    """Tokens within attention and a dense MLP."""
    local_tokens: float
    """Tokens of norms, residuals and experts: with sequence parallelism the tensor rank's share."""


def build_sizes(setup: Setup, tokens: float) -> Sizes:
    architecture = setup.architecture
    named, routing = architecture.sizes, architecture.routing
    return Sizes(
        hidden=named["hidden"],
        q=named["q"] // setup.tensor,
        kv=named["kv"] // setup.tensor,
        values=named["values"] // setup.tensor,
        latents=named["q_latent"] + named["kv_latent"],
        ffn=0 if routing else named["ffn"] // setup.tensor,
        heads=architecture.num_heads // setup.tensor,
        kv_heads=architecture.num_kv_heads // setup.tensor,
        experts_per_token=routing.experts_per_token if routing else 0,
        expert_ffn=routing.ffn_hidden_size if routing else 0,
        shared_ffn=named["shared_ffn"] // setup.tensor,
        tokens=tokens,
        local_tokens=tokens / setup.sequence_size,
    )


def saved_by_layer(setup: Setup) -> dict[str, float]:
    """Return the bytes per microbatch that a layer's backward reads, by part of the layer.

    The residual stream is counted as the input of the norms.
    """
    if setup.recompute == "full":
        return {"layer input": layer_input(setup)}
    return saved_without_recompute(setup)


def layer_input(setup: Setup) -> float:
    s = build_sizes(setup, setup.microbatch_tokens)
    return s.local_tokens * s.hidden * setup.dtype_bytes


def saved_without_recompute(setup: Setup) -> dict[str, float]:
    s, width = build_sizes(setup, setup.microbatch_tokens), setup.dtype_bytes
    local = setup.device == "cpu"
    product_width = FP8 if setup.fp8 else width
    # Input and output; without fusion also the normalized input, which the weight is applied to.
    norm = s.local_tokens * (s.hidden * ((2 if local else 1) * width + product_width) + FP32)
    parts = {"norms": 2 * norm}
    if setup.architecture.latent:
        parts |= _latent_attention(setup, s, width)
    else:
        parts |= _attention(setup, s, width)
    if setup.recompute == "none":
        parts["attention statistics"] = s.tokens * s.heads * FP32
        if local and setup.context > 1:
            parts |= _gathered_attention(setup, s, width)
    if setup.architecture.has_sinks and setup.recompute != "selective":
        parts |= _attention_with_sinks(setup, s, width)
    if setup.adapter:
        parts |= _adapter(setup, s, width)
    if setup.architecture.routing:
        return parts | _experts(setup, s, width)
    # gate and up; without fusion also silu(gate) and up + 0 (Megatron's offset); their product.
    parts["MLP"] = s.tokens * s.ffn * ((4 if local else 2) * width + product_width)
    return parts


def _attention(setup: Setup, s: Sizes, width: int) -> dict[str, float]:
    local = setup.device == "cpu"
    parts = {
        # The product's whole output is kept, since the values are a view of it.
        "queries, keys, values": s.tokens * (s.q + 2 * s.kv) * width,
        "rotated queries and keys": s.tokens * (s.q + s.kv) * width,
        "attention output": s.tokens * s.q * (width + (FP8 if setup.fp8 else 0)),
    }
    if setup.architecture.has_qk_norm:
        # A copy of the queries; the keys are a view, which needs none. Without fusion also both
        # normalized, with fusion one tensor of the keys' size. The statistics are in fp32.
        elements = s.q + (s.q + s.kv if local else s.kv)
        parts["norms of queries and keys"] = s.tokens * (
            elements * width + (s.heads + s.kv_heads) * FP32
        )
    return parts


def _latent_attention(setup: Setup, s: Sizes, width: int) -> dict[str, float]:
    """Return the bytes saved by latent attention.

    Queries and keys are saved after they are joined of a rotated and a plain part. Values are
    copied out of the product.
    """
    local = setup.device == "cpu"
    # Input and output of their norms, as above; a product keeps the output.
    copies = (2 if local else 1) * width + (FP8 if setup.fp8 else width)
    q, values = s.q, s.values
    if local:  # the core attention pads to one size
        q = values = max(q, values)
    return {
        "latent vectors": s.local_tokens * (s.latents * copies + 2 * FP32),
        "queries, keys, values": s.tokens * (2 * q + values) * width,
        # If the values are padded, their padding is cut off in a copy.
        "attention output": s.tokens
        * (
            s.values * (width + (FP8 if setup.fp8 else 0))
            + (values if values > s.values else 0) * width
        ),
    }


def _gathered_attention(setup: Setup, s: Sizes, width: int) -> dict[str, float]:
    """Return the bytes saved by the local core attention with context parallelism.

    It gathers all keys and values. The rank's own are then read only by norms of keys. A mask in
    the activations' dtype replaces the causal flag.
    """
    own = s.q + 2 * s.kv if setup.architecture.has_qk_norm else 0
    mask = s.tokens / setup.microbatch_sequences * setup.sequence_tokens
    if setup.architecture.latent:
        largest = max(s.q, s.values)
        return {
            "queries, keys, values": s.tokens * largest * width,
            "gathered keys and values": s.tokens * 2 * largest * setup.context * width,
            "attention mask": mask * width,
        }
    return {
        "queries, keys, values": s.tokens * own * width,
        "rotated queries and keys": s.tokens * s.q * width,
        "gathered keys and values": s.tokens * 2 * s.kv * setup.context * width,
        "attention mask": mask * width,
    }


def _attention_with_sinks(setup: Setup, s: Sizes, width: int) -> dict[str, float]:
    """Return the bytes saved by the core attention of models with sinks, on every device.

    It copies queries, keys and values, with more dimensions per head and a key per query head, and
    passes a mask in the activations' dtype. Nothing reads the originals again.
    """
    padded = s.q + s.heads * ALIGNMENT
    keys = s.tokens * setup.context
    mask = s.tokens / setup.microbatch_sequences * setup.sequence_tokens
    return {
        "queries, keys, values": 0,
        "rotated queries and keys": 0,
        "gathered keys and values": 0,
        "attention with sinks": 2 * (s.tokens + keys) * padded * width,
        "attention mask": mask * width,
    }


def _experts(setup: Setup, s: Sizes, width: int) -> dict[str, float]:
    """Return the bytes saved by router and experts.

    Tokens are assumed to be spread evenly over the experts. So a rank receives as many tokens from
    other ranks as it sends.
    """
    assert setup.architecture.routing
    chosen = s.local_tokens * s.experts_per_token
    # Logits and probabilities in fp32, and the map from tokens to experts.
    router = s.local_tokens * 3 * setup.architecture.routing.num_experts * FP32
    # As in the dense MLP, and the result weighted by the router's probability.
    columns = 6 if setup.device == "cpu" else 3
    return {
        "router": router,
        # An expert that is split over ranks gets the tokens of all of them.
        "expert inputs": chosen * setup.expert_tensor * s.hidden * width,
        "experts": chosen * columns * s.expert_ffn * width,
        # A dense MLP, whose input and output are each tensor rank's part of the tokens.
        **({"shared experts": s.tokens * columns * s.shared_ffn * width} if s.shared_ffn else {}),
    }


def _adapter(setup: Setup, s: Sizes, width: int) -> dict[str, float]:
    """Return the bytes saved by the adapters of a layer: A x of each adapted linear layer.

    Fused norms keep their output to themselves, so the adapters keep another one.
    """
    assert setup.adapter
    experts, per_token = s.experts_per_token > 0, 0.0
    for row, *_ in adapted_sizes(setup, experts=experts):
        per_token += s.experts_per_token if "{expert}" in row.name else 1
    norms = 0 if setup.device == "cpu" else 2 * s.local_tokens * s.hidden
    return {"adapter": (s.tokens * per_token * setup.adapter.rank + norms) * width}


def _adapter_outputs(setup: Setup, s: Sizes) -> float:
    """Return the numbers of the adapter's output for gate and up, of each expert's, or of q, k and
    v: the parts and the parts joined."""
    if setup.adapter is None:
        return 0
    chosen = s.local_tokens * s.experts_per_token * s.expert_ffn
    return 4 * max(s.tokens * s.ffn, chosen, s.tokens * (s.q + 2 * s.kv) / 2)


def forward_working_set(setup: Setup, tokens: float) -> float:
    """Return the peak bytes of a layer's forward without gradient."""
    s, width = build_sizes(setup, tokens), setup.dtype_bytes
    residual = 2 * s.local_tokens * s.hidden
    attention = s.tokens * (3 * s.q + 4 * s.kv + s.q)
    if setup.architecture.latent:
        # Queries twice, keys, values and their product, which has the plain parts of keys.
        attention = s.tokens * (4 * s.q + 3 * s.values)
    if s.ffn:
        mlp = s.tokens * (5 if setup.device == "cpu" else 3) * s.ffn
    else:
        chosen = s.local_tokens * s.experts_per_token
        # Tokens as sent, as received by the experts, and as returned.
        mlp = chosen * (1 + 2 * setup.expert_tensor) * s.hidden
    gathered = s.tokens * s.hidden if setup.sequence and setup.device == "gpu" else 0
    return (residual + max(attention, mlp) + gathered + _adapter_outputs(setup, s)) * width


def backward_working_set(setup: Setup) -> float:
    """Return the peak bytes of a layer's backward, without the saved activations.

    The peak is in the MLP: the gradients of the residual stream, of the layer's output, and of gate
    and up, while their saved activations still exist.
    """
    s, width = build_sizes(setup, setup.microbatch_tokens), setup.dtype_bytes
    residual = s.local_tokens * s.hidden + s.tokens * s.hidden
    mlp = s.tokens * 2 * s.ffn + s.local_tokens * s.experts_per_token * 2 * s.hidden
    gathered = s.tokens * s.hidden if setup.sequence and setup.device == "gpu" else 0
    return (residual + mlp + gathered + _adapter_outputs(setup, s)) * width
