"""Multi-head latent attention as config.json describes it (DeepSeek-V2, arXiv:2405.04434)."""

from dataclasses import dataclass

from aropd_mcore.convert.json_file import JsonObject

Q_LATENT, NO_Q_LATENT = "q_lora_rank", "no q_lora_rank"
"""Switches of the rows of queries: from a latent vector, or from the hidden state."""


@dataclass(frozen=True)
class Latent:
    """Sizes of attention whose keys and values are computed from one latent vector per token."""

    q_rank: int | None
    """Size of the latent vector of the queries. None: they are computed from the hidden state."""
    kv_rank: int
    """Size of the latent vector of keys and values."""
    plain_dim: int
    """Dimensions of a query and of a key that do not rotate."""
    rotated_dim: int
    """Dimensions that rotate, after the plain ones. All heads share those of the key."""
    value_dim: int
    """Dimensions of a value."""

    @property
    def head_dim(self) -> int:
        """Dimensions of a query and of a key."""
        return self.plain_dim + self.rotated_dim

    @property
    def switch(self) -> str:
        return NO_Q_LATENT if self.q_rank is None else Q_LATENT


def read_latent(config: JsonObject, heads: int, kv_heads: int) -> Latent:
    """Read the sizes of latent attention.

    Raises:
        CheckpointError: a size is missing or out of range, or `head_dim`, `qk_head_dim` or
            `num_key_value_heads` contradict the sizes.
    """
    rank = config.get("q_lora_rank")
    if "q_lora_rank" not in config.values:
        raise config.error("q_lora_rank is missing; expected an integer, or null without latents")
    latent = Latent(
        q_rank=None if rank is None else config.size("q_lora_rank"),
        kv_rank=config.size("kv_lora_rank"),
        plain_dim=config.size("qk_nope_head_dim"),
        rotated_dim=config.size("qk_rope_head_dim"),
        value_dim=config.size("v_head_dim"),
    )
    if latent.rotated_dim % 2:
        raise config.wrong(
            "qk_rope_head_dim", latent.rotated_dim, "an even number, since rope rotates pairs"
        )
    derived = {"head_dim": latent.rotated_dim, "qk_head_dim": latent.head_dim}
    for key, size in derived.items():
        if key in config.values and config.size(key) != size:
            sizes = f"{size} by qk_rope_head_dim and qk_nope_head_dim"
            raise config.wrong(key, config.get(key), sizes)
    if kv_heads != heads:
        raise config.wrong(
            "num_key_value_heads",
            kv_heads,
            f"num_attention_heads, {heads}, since every head has its own key and value",
        )
    return latent
