"""What Megatron's dynamic inference engine wants of a GPU, in plain torch: flash-attn's two
functions over paged keys and values, and a few names of torch.cuda's.

Shape letters: N query tokens, Q those of one row, L keys of one row, P pages, D head dimension.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional


@contextmanager
def paged_attention() -> Iterator[None]:
    """Megatron's engine runs on a CPU inside of it; on leaving, nothing is changed."""
    from megatron.core.inference.contexts import dynamic_context
    from megatron.core.inference.engines import dynamic_engine
    from megatron.core.inference.text_generation_controllers import text_generation_controller
    from megatron.core.transformer import attention

    full = torch.full
    stand_ins = [
        patch.object(attention, "flash_attn_varlen_func", varlen),
        patch.object(attention, "flash_attn_with_kvcache", with_kvcache),
        patch.object(attention, "is_fa_min_version", lambda *_args, **_kwargs: True),
        # From einops, which flash-attn brings; of [N, 1, heads, D] alone.
        patch.object(attention, "rearrange", lambda out, _pattern: out.flatten(-2)),
        # A Triton kernel; without it the context writes keys and values by index.
        patch.object(dynamic_context, "triton_append_key_value_cache", None),
        patch.object(
            torch, "full", lambda *args, pin_memory=False, **kwargs: full(*args, **kwargs)
        ),
        patch.object(torch.cuda.Event, "elapsed_time", lambda *_events: 0.0, create=True),
        *(
            patch.object(module, name, lambda *_args: None, create=True)
            for module in (dynamic_engine, text_generation_controller)
            for name in ("range_push", "range_pop")
        ),
    ]
    for stand_in in stand_ins:
        stand_in.start()
    try:
        yield
    finally:
        for stand_in in stand_ins:
            stand_in.stop()


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    _max_q: int,
    _max_k: int,
    *,
    softmax_scale: float,
    causal: bool,
    block_table: Tensor,
    **_settings: Any,
) -> Tensor:
    """Rows of several queries: q [N, heads, D]; k, v [P, page, KV heads, D]; block_table [B, P]."""
    assert causal
    out = torch.zeros_like(q)
    for row in range(len(cu_seqlens_q) - 1):
        start, end = cu_seqlens_q[row : row + 2].tolist()
        length = int(cu_seqlens_k[row + 1] - cu_seqlens_k[row])
        if end > start:
            out[start:end] = attend(q[start:end], k, v, block_table[row], length, softmax_scale)
    return out


def with_kvcache(
    *,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    causal: bool,
    block_table: Tensor,
    **_settings: Any,
) -> Tensor:
    """Rows of one query: q [B, 1, heads, D]. Rows of no length are padding."""
    assert causal
    out = torch.zeros_like(q)
    for row, length in enumerate(cache_seqlens.tolist()):
        if length:
            out[row] = attend(q[row], k_cache, v_cache, block_table[row], length, None)
    return out


def attend(
    q_QMD: Tensor, k: Tensor, v: Tensor, pages_P: Tensor, length: int, scale: float | None
) -> Tensor:
    """The row's queries are its last tokens."""
    used = pages_P[: -(-length // k.size(1))].long()
    keys_LGD, values_LGD = (cache[used].flatten(0, 1)[:length] for cache in (k, v))
    queries = torch.arange(length - len(q_QMD), length)
    visible_QL = torch.arange(length) <= queries[:, None]
    out_MQD = functional.scaled_dot_product_attention(
        *(part.transpose(0, 1)[None] for part in (q_QMD, keys_LGD, values_LGD)),
        attn_mask=visible_QL,
        scale=scale,
        enable_gqa=True,
    )[0]
    return out_MQD.transpose(0, 1)
