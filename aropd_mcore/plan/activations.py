"""What a transformer layer keeps for its backward, and what its passes hold while they run.

Numbers are bytes of one layer on one rank, for one microbatch. The tables count what autograd
saves, tensor by tensor. `cpu` is Megatron's local layer spec with this package's core attention, as
`torch.autograd.graph.saved_tensors_hooks` shows it. `gpu` is Transformer Engine's spec: Korthikanti
et al., arXiv:2205.05198, for RMSNorm without dropout, flash attention, a fused SwiGLU, and norms
fused into the linear layer behind them (which keeps the norm's output for its weight's gradient).
In fp8 what a product keeps of its input is a byte a number, beside what others keep of it.

Letters: H hidden, q and kv all query and all key/value heads' dimensions of a rank, F the MLP's
columns of a rank, k experts a token, E an expert's columns.
"""

from dataclasses import dataclass

from aropd_mcore.plan.setup import Setup

FP32 = 4
FP8 = 1


@dataclass(frozen=True)
class Sizes:
    """The letters, and tokens: a tensor rank's between matrix products, and all within them."""

    hidden: int
    q: int
    kv: int
    ffn: int
    heads: int
    kv_heads: int
    experts_per_token: int
    expert_ffn: int
    tokens: float
    """Inside attention and a dense MLP."""
    local_tokens: float
    """Under sequence parallelism a tensor rank's share; norms, residuals and experts see them."""


def sizes_of(setup: Setup, tokens: float) -> Sizes:
    architecture = setup.architecture
    named, routing = architecture.sizes, architecture.routing
    return Sizes(
        hidden=named["hidden"],
        q=named["q"] // setup.tensor,
        kv=named["kv"] // setup.tensor,
        ffn=0 if routing else named["ffn"] // setup.tensor,
        heads=architecture.num_heads // setup.tensor,
        kv_heads=architecture.num_kv_heads // setup.tensor,
        experts_per_token=routing.experts_per_token if routing else 0,
        expert_ffn=routing.ffn_hidden_size if routing else 0,
        tokens=tokens,
        local_tokens=tokens / setup.sequence_size,
    )


def saved_by_layer(setup: Setup) -> dict[str, float]:
    """Bytes a microbatch, by part of the layer, of everything that its backward reads.

    The residual stream is counted as the input of the norms.
    """
    if setup.recompute == "full":
        return {"layer input": layer_input(setup)}
    return saved_without_recompute(setup)


def layer_input(setup: Setup) -> float:
    s = sizes_of(setup, setup.microbatch_tokens)
    return s.local_tokens * s.hidden * setup.dtype_bytes


def saved_without_recompute(setup: Setup) -> dict[str, float]:
    s, width = sizes_of(setup, setup.microbatch_tokens), setup.dtype_bytes
    local = setup.device == "cpu"
    of_product = FP8 if setup.fp8 else width
    # Input and output; without fusion also the normalized input, which the weight multiplies.
    norm = s.local_tokens * (s.hidden * ((2 if local else 1) * width + of_product) + FP32)
    parts = {
        "norms": 2 * norm,
        # The product's output lives on as the values, a view of it.
        "queries, keys, values": s.tokens * (s.q + 2 * s.kv) * width,
        "rotated queries and keys": s.tokens * (s.q + s.kv) * width,
        "attention output": s.tokens * s.q * (width + (FP8 if setup.fp8 else 0)),
    }
    if setup.architecture.family.has_qk_norm:
        # A copy of the queries, which the view of keys does not need; and, without fusion, both
        # normalized. Two statistics in fp32.
        elements = s.q + (s.q + s.kv if local else s.kv)
        parts["norms of queries and keys"] = s.tokens * (
            elements * width + (s.heads + s.kv_heads) * FP32
        )
    if setup.recompute == "none":
        parts["attention statistics"] = s.tokens * s.heads * FP32
        if local and setup.context > 1:
            parts |= _gathered_attention(setup, s, width)
    if setup.architecture.routing:
        return parts | _experts(setup, s, width)
    # gate | up; without fusion silu(gate), up + 0 (Megatron's offset); and their product.
    parts["MLP"] = s.tokens * s.ffn * ((4 if local else 2) * width + of_product)
    return parts


def _gathered_attention(setup: Setup, s: Sizes, width: int) -> dict[str, float]:
    """Under context parallelism the local core attention gathers all keys and values.

    Nothing then looks at this rank's own, except norms of keys; and where a causal flag was, there
    is a mask, in the activations' dtype.
    """
    own = s.q + 2 * s.kv if setup.architecture.family.has_qk_norm else 0
    mask = s.tokens / setup.microbatch_sequences * setup.sequence_tokens
    return {
        "queries, keys, values": s.tokens * own * width,
        "rotated queries and keys": s.tokens * s.q * width,
        "gathered keys and values": s.tokens * 2 * s.kv * setup.context * width,
        "attention mask": mask * width,
    }


def _experts(setup: Setup, s: Sizes, width: int) -> dict[str, float]:
    """Tokens fall on the experts evenly: with expert parallelism a rank gets as many as it has."""
    assert setup.architecture.routing
    chosen = s.local_tokens * s.experts_per_token
    # Logits and probabilities in fp32, and the map of who goes where.
    router = s.local_tokens * 3 * setup.architecture.routing.num_experts * FP32
    # As the MLP's; then weighted by the router's probability.
    columns = 6 if setup.device == "cpu" else 3
    return {
        "router": router,
        # Cut over ranks, an expert gets the tokens of all of them and has fewer columns.
        "expert inputs": chosen * setup.expert_tensor * s.hidden * width,
        "experts": chosen * columns * s.expert_ffn * width,
    }


def forward_working_set(setup: Setup, tokens: float) -> float:
    """Bytes that a layer's forward without gradient holds at its largest point."""
    s, width = sizes_of(setup, tokens), setup.dtype_bytes
    residual = 2 * s.local_tokens * s.hidden
    attention = s.tokens * (3 * s.q + 4 * s.kv + s.q)
    if s.ffn:
        mlp = s.tokens * (5 if setup.device == "cpu" else 3) * s.ffn
    else:
        chosen = s.local_tokens * s.experts_per_token
        # Tokens as they are sent, as the experts get them and as they come back.
        mlp = chosen * (1 + 2 * setup.expert_tensor) * s.hidden
    gathered = s.tokens * s.hidden if setup.sequence and setup.device == "gpu" else 0
    return (residual + max(attention, mlp) + gathered) * width


def backward_working_set(setup: Setup) -> float:
    """Bytes that a layer's backward holds beside what was saved, at its largest point.

    It is in the MLP: the gradients of the residual stream and of the layer's output, and of gate
    and up, while what was saved for them still stands.
    """
    s, width = sizes_of(setup, setup.microbatch_tokens), setup.dtype_bytes
    residual = s.local_tokens * s.hidden + s.tokens * s.hidden
    mlp = s.tokens * 2 * s.ffn + s.local_tokens * s.experts_per_token * 2 * s.hidden
    gathered = s.tokens * s.hidden if setup.sequence and setup.device == "gpu" else 0
    return (residual + mlp + gathered) * width
