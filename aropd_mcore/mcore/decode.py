"""Decoding with a KV cache by the model's own forward, on any tensor x pipeline layout.

Tokens pass the layers packed: the N tokens of a forward, of any rows, are N positions of one
sequence, [N, 1, H]. All layers but core attention process each token separately, and rotary angles
are given per token. While decoding, core attention is replaced by a module that caches each row's
keys and values.

This has three effects:

- No padding passes the model, except to round N up.
- One forward takes whole prompts of new rows and next tokens of old rows, at any lengths.
- Each row counts its positions from 0, as in training.

Megatron's StaticInferenceContext keeps all rows at one length instead. It pads prompts on the left,
and Transformer Engine's attention does not mask this padding after the first forward
(transformer/attention.py, AttnMaskType.no_mask). It also rotates all keys again for every token.

Shape letters: N tokens of a forward, B rows, S longest prompt, M query heads, G KV heads, R query
heads per KV head, L visible keys, H hidden, D head dimension, V vocabulary.
"""

from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor
from torch.nn import functional

from aropd_mcore.mcore.model import StageModel
from aropd_mcore.mcore.runtime import Runtime

BUCKET_SPREAD = 4 / 3
"""Largest ratio of prompt lengths in one call of the attention kernel, in which prompts are padded
to the longest."""


@contextmanager
def decoding(
    model: StageModel, runtime: Runtime, *, num_rows: int, max_length: int
) -> Iterator["Decoder"]:
    """Context that yields a Decoder and restores the model afterwards.

    Inside, the model is in evaluation mode, without gradient, and its core attention is replaced.
    The KV cache has 2 x num_rows x max_length x KV heads x D numbers per layer and is freed with
    the Decoder.

    The mode is torch.no_grad, not inference_mode, because Megatron caches rotary tables, and its
    fused rotary embedding cannot save an inference tensor for backward.

    Args:
        num_rows: largest number of rows that are decoded at once.
        max_length: largest number of tokens of a row, prompt and response together.
    """
    attentions: list[Any] = [layer.self_attention for layer in model.layers]
    stock = [attention.core_attention for attention in attentions]
    was_training = model.training
    model.eval()
    rows = _Rows(num_rows, max_length)
    caches = [_CachedAttention(rows, model.config.softmax_scale) for _ in attentions]
    try:
        for attention, cache in zip(attentions, caches, strict=True):
            attention.core_attention = cache
        for chunk in model:
            # Transformer Engine caches FP8 copies of the weights. This makes it cast them again.
            chunk.set_is_first_microbatch()
        with torch.no_grad():
            yield Decoder(model, runtime, rows, caches)
    finally:
        for attention, core_attention in zip(attentions, stock, strict=True):
            attention.core_attention = core_attention
        model.train(was_training)


class Decoder:
    """Decoder that computes logits of the next token of every row. Rows can be added and dropped.

    Logits are gathered on the sampling rank of the replica. `share` broadcasts its samples.
    """

    def __init__(
        self,
        model: StageModel,
        runtime: Runtime,
        rows: "_Rows",
        caches: list["_CachedAttention"],
    ):
        self.model = model
        self.runtime = runtime
        self._rows = rows
        self._caches = caches
        # `packed_seq`: angles of all positions, not only of this context rank's.
        self._angles = next(iter(model)).rotary_pos_emb(rows.max_length, packed_seq=True)

    def forward(self, tokens_B: Tensor, prompts: Sequence[Sequence[int]]) -> Tensor | None:
        """Append a token to every row, append new rows with their prompts, and compute logits.

        Args:
            tokens_B: int64 [existing rows], on the device, the same on every rank of the replica.
            prompts: prompts of the new rows. Sort them by length for speed: neighbours of similar
                length share a call of the attention kernel.
        Returns:
            Logits of the token after each row, new rows included: [B, vocab_size] fp32 on the
            sampling rank, None on the others.
        Collectives: the model's own over tp_group, sends of hidden states between stages, and a
            gather of [B, V / tp] over the last stage's tp_group.
        """
        new = torch.tensor([token for prompt in prompts for token in prompt], dtype=torch.int64)
        self._rows.advance([len(prompt) for prompt in prompts], self.runtime.device)
        hidden_NH = self._forward(torch.cat([tokens_B, new.to(tokens_B.device)]))
        hidden_BH = None if hidden_NH is None else hidden_NH[self._rows.last_B]
        return _next_token_logits(self.model, self.runtime, hidden_BH)

    def drop(self, done: Set[int]) -> list[int]:
        """Remove rows. The last remaining rows move to the free places.

        Args:
            done: indices of the rows to remove.
        Returns:
            For each remaining row, in the new order, its old index.
        """
        order = self._rows.drop(done)
        moved = [(new, old) for new, old in enumerate(order) if new != old]
        if moved:
            new_indices, old_indices = map(list, zip(*moved, strict=True))
            for cache in self._caches:
                cache.move(old_indices, new_indices)
        return order

    def _forward(self, tokens_N: Tensor) -> Tensor | None:
        """Return final hidden states [N, H] on the last stage, None on other stages.

        Waits for the previous stage. N is padded to the multiple that FP8 matrix products and
        sequence parallelism need. Under sequence parallelism each tensor rank holds its part of the
        tokens between matrix products and between stages.
        """
        runtime, num_tokens = self.runtime, tokens_N.numel()
        padding = (0, -num_tokens % (runtime.token_multiple * runtime.sequence_size))
        tokens_N = functional.pad(tokens_N, padding)
        positions_N = functional.pad(self._rows.positions_N, padding)
        hidden_N1H = None
        for chunk in self.model:
            if chunk.pre_process:
                hidden_N1H = chunk.embedding(tokens_N[None], positions_N[None])
            else:
                chunk.decoder.set_input_tensor(self._receive(tokens_N.numel()))
            hidden_N1H = chunk.decoder(
                hidden_states=hidden_N1H,
                attention_mask=None,
                rotary_pos_emb=self._angles[positions_N],
            )
            if not chunk.post_process:
                next_stage = (runtime.pp_rank + 1) % runtime.pp_size
                next_rank = dist.get_global_rank(runtime.pp_group, next_stage)
                dist.send(hidden_N1H, next_rank, group=runtime.pp_group)
        if not runtime.is_last_stage:
            return None
        assert hidden_N1H is not None
        if runtime.sequence_parallel:
            hidden_N1H = gather_from_sequence_parallel_region(hidden_N1H)
        return hidden_N1H[:num_tokens].squeeze(1)

    def _receive(self, num_tokens: int) -> Tensor:
        """Receive the previous stage's hidden states of `num_tokens` tokens."""
        runtime, config = self.runtime, self.model.config
        hidden_N1H = torch.empty(
            (num_tokens // runtime.sequence_size, 1, config.hidden_size),
            dtype=config.pipeline_dtype,
            device=runtime.device,
        )
        previous_stage = (runtime.pp_rank - 1) % runtime.pp_size
        previous_rank = dist.get_global_rank(runtime.pp_group, previous_stage)
        dist.recv(hidden_N1H, previous_rank, group=runtime.pp_group)
        return hidden_N1H


def _next_token_logits(
    model: StageModel, runtime: Runtime, hidden_BH: Tensor | None
) -> Tensor | None:
    """Apply the output head and gather the logits on the sampling rank (Runtime.samples).

    Args:
        hidden_BH: final hidden states of each row's last token on the last stage, None elsewhere.
    Returns:
        [B, vocab_size] fp32 on the sampling rank, None on the others.
    Collectives: a gather of [B, V / tp] over the last stage's tp_group.
    """
    if hidden_BH is None:
        return None
    logits_BV = functional.linear(hidden_BH, model.head_weight())
    if runtime.tp_size > 1:
        group = runtime.tp_group
        shards = [torch.empty_like(logits_BV) for _ in range(group.size())]
        first = dist.get_global_rank(group, 0)
        dist.gather(logits_BV, shards if runtime.samples else None, first, group=group)
        logits_BV = torch.cat(shards, dim=-1)
    return logits_BV[:, : model.vocab_size].float() if runtime.samples else None


def share(tensor: Tensor, runtime: Runtime) -> None:
    """Broadcast the sampling rank's values of `tensor` to every rank of the replica, in place.

    If every rank sampled by itself, kernels that sum in another order could make samples differ.

    Collectives: a broadcast over the last stage's tp_group, then one over pp_group.
    """
    if runtime.tp_size > 1 and runtime.is_last_stage:
        first = dist.get_global_rank(runtime.tp_group, 0)
        dist.broadcast(tensor, first, group=runtime.tp_group)
    if runtime.pp_size > 1:
        dist.broadcast(tensor, runtime.last_stage_rank, group=runtime.pp_group)


class _Rows:
    """The current rows, and the positions of the current forward's tokens in them.

    One object is shared by the attention of all layers.
    """

    def __init__(self, num_rows: int, max_length: int):
        self.num_rows = num_rows
        self.max_length = max_length
        self.lengths: list[int] = []
        """Number of tokens of each row, including the current forward's."""
        self.num_old = 0
        """Number of rows to which the current forward adds one token. Later rows are new."""
        self.buckets: list[range] = []
        """Indices of the new rows, in runs of similar lengths."""
        self.rows_N = self.positions_N = self.last_B = torch.empty(0)
        """Row and position of each token, and the index of each row's last token among the N."""
        self.visible_B11L = torch.empty(0)
        """Mask of the keys that the token of each old row sees."""

    def advance(self, prompt_lengths: list[int], device: torch.device) -> None:
        """Append one token to each row, and append new rows of these lengths."""
        self.num_old = len(self.lengths)
        self.buckets = [
            range(run.start + self.num_old, run.stop + self.num_old)
            for run in _runs_of_similar(prompt_lengths)
        ]
        starts_B = torch.tensor([*self.lengths, *[0] * len(prompt_lengths)])
        counts_B = torch.tensor([1] * self.num_old + prompt_lengths)
        ends_B = counts_B.cumsum(0)
        rows_N = torch.arange(len(counts_B)).repeat_interleave(counts_B)
        positions_N = torch.arange(len(rows_N)) + (starts_B - ends_B + counts_B)[rows_N]
        self.lengths = (starts_B + counts_B).tolist()
        assert len(self.lengths) <= self.num_rows and max(self.lengths) <= self.max_length
        self.rows_N, self.positions_N = rows_N.to(device), positions_N.to(device)
        self.last_B = (ends_B - 1).to(device)
        if self.num_old:
            keys_L = torch.arange(max(self.lengths[: self.num_old]), device=device)
            self.visible_B11L = keys_L <= self.positions_N[: self.num_old, None, None, None]

    def drop(self, done: Set[int]) -> list[int]:
        """Remove rows and return the old index of each remaining row; see Decoder.drop."""
        num_left = len(self.lengths) - len(done)
        movers = iter([row for row in range(num_left, len(self.lengths)) if row not in done])
        order = [next(movers) if row in done else row for row in range(num_left)]
        self.lengths = [self.lengths[row] for row in order]
        return order


def _runs_of_similar(lengths: Sequence[int]) -> Iterator[range]:
    """Yield runs of neighbours with lengths that differ by a factor of at most BUCKET_SPREAD."""
    start = 0
    for end in range(1, len(lengths) + 1):
        run = lengths[start : end + 1]
        if end == len(lengths) or max(run) > BUCKET_SPREAD * min(run):
            yield range(start, end)
            start = end


class _CachedAttention(torch.nn.Module):
    """Core attention over one layer's cached keys and values, with Megatron's arguments.

    Query [N, 1, M, D], key and value [N, 1, G, D], already rotated and padded at the end. The
    result is [N, 1, M x D], with zeros for the padding.
    """

    def __init__(self, rows: _Rows, scale: float | None):
        super().__init__()
        self.rows = rows
        self.scale = scale
        self.keys_BGLD = self.values_BGLD = torch.empty(0)

    def move(self, old_indices: list[int], new_indices: list[int]) -> None:
        """Move the cache of rows from old to new indices."""
        for cache_BGLD in (self.keys_BGLD, self.values_BGLD):
            cache_BGLD[new_indices] = cache_BGLD[old_indices]

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *_masks: Any, **_mask_settings: Any
    ) -> Tensor:
        rows = self.rows
        place = (rows.rows_N, slice(None), rows.positions_N)
        num_tokens = rows.positions_N.numel()  # without padding
        num_padded, _, num_heads, head_dim = query.shape
        query_NMD, key, value = (part[:num_tokens].squeeze(1) for part in (query, key, value))
        if not self.keys_BGLD.numel():
            # Zeros, because masked keys have weight 0, and 0 x NaN is NaN.
            shape = (rows.num_rows, key.size(1), rows.max_length, head_dim)
            self.keys_BGLD, self.values_BGLD = key.new_zeros(shape), value.new_zeros(shape)
        self.keys_BGLD[place] = key
        self.values_BGLD[place] = value

        parts = [self._old(query_NMD[: rows.num_old])] if rows.num_old else []
        start = rows.num_old
        for bucket in rows.buckets:
            lengths = rows.lengths[bucket.start : bucket.stop]
            parts.append(self._new(query_NMD[start : start + sum(lengths)], bucket, lengths))
            start += sum(lengths)
        context = torch.cat(parts).reshape(num_tokens, 1, num_heads * head_dim)
        return functional.pad(context, (0, 0, 0, 0, 0, num_padded - num_tokens))

    def _old(self, query_BMD: Tensor) -> Tensor:
        """Attend with one token per row. Query heads that share a KV head are its R queries."""
        visible_B11L = self.rows.visible_B11L
        num_rows, num_keys = visible_B11L.size(0), visible_B11L.size(-1)
        keys, values = (c[:num_rows, :, :num_keys] for c in (self.keys_BGLD, self.values_BGLD))
        context_BGRD = functional.scaled_dot_product_attention(
            query_BMD.unflatten(1, (keys.size(1), -1)),
            keys,
            values,
            attn_mask=visible_B11L,
            scale=self.scale,
        )
        return context_BGRD.flatten(1, 2)

    def _new(self, query_NMD: Tensor, bucket: range, lengths: list[int]) -> Tensor:
        """Attend within whole prompts, padded to the longest of the bucket."""
        longest = max(lengths)
        counted_BS = torch.arange(longest) < torch.tensor(lengths)[:, None]
        counted_BS = counted_BS.to(query_NMD.device)
        query_BSMD = query_NMD.new_zeros((len(lengths), longest, *query_NMD.shape[1:]))
        query_BSMD[counted_BS] = query_NMD
        keys, values = (
            cache[bucket.start : bucket.stop, :, :longest]
            for cache in (self.keys_BGLD, self.values_BGLD)
        )
        context_BMSD = functional.scaled_dot_product_attention(
            query_BSMD.transpose(1, 2),
            keys,
            values,
            is_causal=True,
            scale=self.scale,
            enable_gqa=query_NMD.size(1) > keys.size(1),
        )
        return context_BMSD.transpose(1, 2)[counted_BS]
