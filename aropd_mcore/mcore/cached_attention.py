"""Core attention over cached keys and values, for decoding.

Shape letters: N tokens of a forward, P prompts, B rows, S longest prompt, M query heads, G KV
heads, R query heads per KV head, L keys of a row, D dimension of a key or of a value.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from aropd_mcore.mcore.patches.local_attention import attend, causal_mask

BUCKET_SPREAD = 4 / 3
"""Largest ratio of prompt lengths in one call of the attention kernel, in which prompts are padded
to the longest."""


class KVCache:
    """Memory of the keys and values of all layers, at one address for many batches.

    A batch uses the memory in its own shape. Memory is allocated again only for a batch that needs
    more than all batches before it. Engines that never sample at the same time can share a cache.
    """

    def __init__(self) -> None:
        self._numbers: Tensor | None = None

    def view(self, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return zeros of a shape, which overwrite those of the previous call.

        They are zeros because masked keys have weight 0, and 0 x NaN is NaN.
        """
        size = torch.Size(shape).numel()
        numbers = self._numbers
        if numbers is None or numbers.numel() < size or numbers.dtype != dtype:
            numbers = self._numbers = None  # freed first
            numbers = self._numbers = torch.empty(size, dtype=dtype, device=device)
        return numbers[:size].view(*shape).zero_()


@dataclass(frozen=True)
class PromptBucket:
    """Prompts of similar lengths, which one call of the attention kernel processes."""

    tokens: slice
    """Place of the prompts' tokens among the N tokens of the forward."""
    rows_N: Tensor
    """Index within the bucket of each of these tokens' prompts."""
    shape: tuple[int, int]
    """Number of prompts, and length of the longest."""


@dataclass
class Places:
    """Places of the current forward's tokens in the cache. All layers share one object."""

    rows_N: Tensor = field(default_factory=lambda: torch.empty(0))
    positions_N: Tensor = field(default_factory=lambda: torch.empty(0))
    """Row and position of each token, int64, without padding."""
    next_rows: slice = field(default_factory=lambda: slice(0))
    """Rows of the tokens, if they are one token of each."""
    mask_B11L: Tensor | None = None
    """For one token of each row: 0 for the keys that it sees, -inf for the others. None: the
    tokens are whole prompts."""
    window: int | None = None
    """Number of keys that a token sees in layers with a sliding window. None: no layer has one."""
    window_mask_B11L: Tensor | None = None
    """The mask of layers with a sliding window. None if there are none, and with whole prompts."""
    buckets: list[PromptBucket] = field(default_factory=list)
    """The prompts, if the tokens are prompts."""

    def place_prompts(
        self, rows: Sequence[int], prompts: Sequence[Sequence[int]], device: torch.device
    ) -> Tensor:
        """Set the places of whole prompts in these rows, and return their tokens, int64 [N]."""
        lengths = [len(prompt) for prompt in prompts]
        lengths_P, rows_P = torch.tensor(lengths), torch.tensor(rows)
        starts_P = lengths_P.cumsum(0) - lengths_P
        first_P = torch.empty_like(rows_P)  # first prompt of each prompt's bucket
        buckets = list(runs_of_similar(lengths))
        for run in buckets:
            first_P[run.start : run.stop] = run.start
        prompts_N = torch.arange(len(prompts)).repeat_interleave(lengths_P)
        places = torch.stack(
            [
                torch.tensor([token for prompt in prompts for token in prompt]),
                rows_P[prompts_N],
                torch.arange(len(prompts_N)) - starts_P[prompts_N],
                prompts_N - first_P[prompts_N],
            ]
        )
        tokens_N, self.rows_N, self.positions_N, bucket_rows_N = places.to(device)
        self.mask_B11L = self.window_mask_B11L = None
        self.buckets, end = [], 0
        for run in buckets:
            in_bucket = lengths[run.start : run.stop]
            tokens = slice(end, end := end + sum(in_bucket))
            shape = len(in_bucket), max(in_bucket)
            self.buckets.append(PromptBucket(tokens, bucket_rows_N[tokens], shape))
        return tokens_N

    def place_next(
        self, rows: slice, positions_B: Tensor, num_keys: int, dtype: torch.dtype
    ) -> None:
        """Set the places of one token of each of the B rows, which sees at most num_keys keys.

        Args:
            rows: consecutive rows, from its start to its stop.
            positions_B: int64 on the device. Nothing of it is read on the host.
            dtype: dtype of the attention's query.
        """
        device = positions_B.device
        self.next_rows = rows
        self.rows_N = torch.arange(rows.start, rows.stop, device=device)
        self.positions_N = positions_B
        keys_1L, positions_B1 = torch.arange(num_keys, device=device)[None], positions_B[:, None]
        mask_BL = torch.zeros(len(positions_B), num_keys, dtype=dtype, device=device)
        mask_BL.masked_fill_(keys_1L > positions_B1, -torch.inf)
        self.mask_B11L = mask_BL[:, None, None]
        if self.window is not None:
            is_before_BL = keys_1L <= positions_B1 - self.window
            self.window_mask_B11L = mask_BL.masked_fill(is_before_BL, -torch.inf)[:, None, None]


def runs_of_similar(lengths: Sequence[int]) -> Iterator[range]:
    """Yield runs of neighbours with lengths that differ by a factor of at most BUCKET_SPREAD."""
    start = 0
    for end in range(1, len(lengths) + 1):
        run = lengths[start : end + 1]
        if end == len(lengths) or max(run) > BUCKET_SPREAD * min(run):
            yield range(start, end)
            start = end


class CachedAttention(torch.nn.Module):
    """Core attention over one layer's cached keys and values, with Megatron's arguments.

    Query [N, 1, M, D], key and value [N, 1, G, D], already rotated and padded at the end. The
    result is [N, 1, M x D], with zeros for the padding.
    """

    def __init__(
        self,
        places: Places,
        keys_BGLD: Tensor,
        values_BGLD: Tensor,
        scale: float | None,
        *,
        has_window: bool = False,
        sinks: Tensor | None = None,
    ):
        """
        Args:
            keys_BGLD, values_BGLD: the cache. With sinks, L is one more than the number of tokens:
                the key at index 0 is zero, and a sink is its logit.
            has_window: a token sees the last Places.window keys only.
            sinks: logits [M] that take part in the softmax and have no value. None: there are none.
        """
        super().__init__()
        self.places = places
        self.has_window = has_window
        self.keys_BGLD, self.values_BGLD = keys_BGLD, values_BGLD
        self.scale = scale
        self.sinks = sinks
        self.first = int(sinks is not None)  # index of a row's first token in the cache

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *_masks: Any, **_mask_settings: Any
    ) -> Tensor:
        places = self.places
        num_padded, num_tokens = len(query), len(places.positions_N)
        query_NMD, key_NGD, value_NGD = (t[:num_tokens].squeeze(1) for t in (query, key, value))
        place = (places.rows_N, slice(None), places.positions_N + self.first)
        self.keys_BGLD[place] = key_NGD
        self.values_BGLD[place] = value_NGD
        mask_B11L = places.window_mask_B11L if self.has_window else places.mask_B11L
        if mask_B11L is None:
            context_NMD = self._prompts(query_NMD, key_NGD, value_NGD)
        else:
            context_NMD = self._next(query_NMD, mask_B11L)
        context = context_NMD.reshape(num_tokens, 1, -1)
        return functional.pad(context, (0, 0, 0, 0, 0, num_padded - num_tokens))

    def _next(self, query_BMD: Tensor, mask_B11L: Tensor) -> Tensor:
        """Attend with one token per row. Query heads that share a KV head are its R queries."""
        rows, num_keys = self.places.next_rows, mask_B11L.size(-1) + self.first
        keys, values = (c[rows, :, :num_keys] for c in (self.keys_BGLD, self.values_BGLD))
        mask = mask_B11L
        if self.sinks is not None:
            sinks_GR1 = self.sinks.unflatten(0, (keys.size(1), -1))[..., None]
            sizes = len(query_BMD), *sinks_GR1.shape[:2], -1
            mask = torch.cat([sinks_GR1.expand(sizes), mask_B11L.expand(sizes)], dim=-1)
        context_BGRD = functional.scaled_dot_product_attention(
            query_BMD.unflatten(1, (keys.size(1), -1)),
            keys,
            values,
            attn_mask=mask,
            scale=self.scale,
        )
        return context_BGRD.flatten(1, 2)

    def _prompts(self, *parts: Tensor) -> Tensor:
        """Attend within whole prompts, padded to the longest of each bucket.

        Args:
            parts: query [N, M, D], key and value [N, G, D].
        """
        contexts = []
        for bucket in self.places.buckets:
            place = (bucket.rows_N, self.places.positions_N[bucket.tokens])
            query, key, value = (
                part.new_zeros(bucket.shape + part.shape[1:])
                .index_put(place, part[bucket.tokens])
                .transpose(1, 2)
                for part in parts
            )
            window = self.places.window if self.has_window else None
            length = bucket.shape[1]
            visible = causal_mask(length, length, window, query.device)
            context_BMSD = attend(
                query, key, value, visible_SL=visible, scale=self.scale, sinks_M=self.sinks
            )
            contexts.append(context_BMSD.transpose(1, 2)[place])
        return torch.cat(contexts)
