"""Cached decoding: the model's own forward, token by token, on any tensor x pipeline layout.

Tokens go through the layers packed: the N tokens of a forward, whichever rows of the batch they
belong to, are N positions of one sequence, [N, 1, H]. Everything but core attention looks at one
token at a time, and rotary angles are given per token, so core attention alone has to know of rows
and of the past; while decoding it is replaced by one that keeps each row's keys and values.

So no padding goes through the model, rows of different lengths stand side by side, and each counts
its positions from 0 as it does in training. Megatron's StaticInferenceContext holds all rows at one
length instead: prompts padded in front, which Transformer Engine's attention does not mask past the
first forward (transformer/attention.py, AttnMaskType.no_mask), and all keys rotated anew for every
token.

Shape letters: N tokens of a forward, B rows, S longest prompt, L keys in view, H hidden, D head
dimension, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor
from torch.nn import functional

from aropd_mcore.mcore.model import StageModel
from aropd_mcore.mcore.runtime import Runtime


@contextmanager
def decoding(
    model: StageModel, runtime: Runtime, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> Iterator["Decoder"]:
    """A Decoder for this batch of prompts; on leaving, the model is as it was before.

    In between the model is in evaluation mode, without gradient and without its own core attention.
    The cache, 2 x B x (longest prompt + max_new_tokens) x KV heads x D numbers a layer, lives as
    long as the Decoder. The mode is torch.no_grad and not inference_mode: Megatron keeps rotary
    tables in a cache, and its fused rotary embedding cannot save an inference tensor for backward.
    """
    attentions: list[Any] = [layer.self_attention for layer in model.layers]
    stock = [attention.core_attention for attention in attentions]
    was_training = model.training
    model.eval()
    batch = _Batch(prompts, max_new_tokens, runtime.device)
    try:
        for attention in attentions:
            attention.core_attention = _CachedAttention(batch, model.config.softmax_scale)
        for chunk in model:
            # Transformer Engine keeps weights that it cast to fp8, until told that they changed.
            chunk.set_is_first_microbatch()
        with torch.no_grad():
            yield Decoder(model, runtime, batch)
    finally:
        for attention, core_attention in zip(attentions, stock, strict=True):
            attention.core_attention = core_attention
        model.train(was_training)


class Decoder:
    """Logits of a batch's next tokens, forward by forward: `prefill` once, then `step`.

    Logits are gathered on one rank of the replica, the one that samples: what it draws is broadcast
    (`share`), so that ranks cannot come to differ by a kernel that sums in another order.
    """

    def __init__(self, model: StageModel, runtime: Runtime, batch: "_Batch"):
        self.model = model
        self.runtime = runtime
        self._batch = batch
        # `packed_seq`: of all positions, not of this context rank's.
        self._angles = next(iter(model)).rotary_pos_emb(batch.max_length, packed_seq=True)

    @property
    def samples(self) -> bool:
        """Whether this rank is the one that gets the logits."""
        return self.runtime.is_last_stage and self.runtime.tp_rank == 0

    def prefill(self) -> Tensor | None:
        """The whole prompts: logits of each row's first response token.

        Returns:
            [B, vocab_size] fp32 on the rank that samples, None on the others.
        Collectives: as in `step`.
        """
        hidden_NH = self._forward(self._batch.prompt_tokens_N)
        return self._logits(None if hidden_NH is None else hidden_NH[self._batch.last_B])

    def step(self, tokens_B: Tensor) -> Tensor | None:
        """One more token on every row: logits of the token after it.

        Args:
            tokens_B: int64 [B], the same on every rank of the replica.
        Returns:
            [B, vocab_size] fp32 on the rank that samples, None on the others.
        Collectives: the model's own over tp_group; hidden states stage to stage over pp_group; a
            gather of [B, V / tp] over the last stage's tp_group.
        """
        self._batch.advance()
        return self._logits(self._forward(tokens_B))

    def share(self, tensor: Tensor) -> None:
        """Give `tensor` the sampling rank's values on every rank of the replica, in place.

        Collectives: a broadcast over the last stage's tp_group, then one over pp_group.
        """
        runtime = self.runtime
        if runtime.tp_size > 1 and runtime.is_last_stage:
            first = dist.get_global_rank(runtime.tp_group, 0)
            dist.broadcast(tensor, first, group=runtime.tp_group)
        if runtime.pp_size > 1:
            dist.broadcast(tensor, runtime.last_stage_rank, group=runtime.pp_group)

    def _forward(self, tokens_N: Tensor) -> Tensor | None:
        """Final hidden states [N, H] on the last stage, None elsewhere; waits for the stage before.

        N is padded to what products in fp8 need. Under sequence parallelism each tensor rank holds
        its part of them between matrix products and from stage to stage.
        """
        runtime, num_tokens = self.runtime, tokens_N.numel()
        padding = (0, -num_tokens % (runtime.token_multiple * runtime.sequence_size))
        tokens_N = functional.pad(tokens_N, padding)
        positions_N = functional.pad(self._batch.positions_N, padding)
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
                after = (runtime.pp_rank + 1) % runtime.pp_size
                after = dist.get_global_rank(runtime.pp_group, after)
                dist.send(hidden_N1H, after, group=runtime.pp_group)
        if not runtime.is_last_stage:
            return None
        assert hidden_N1H is not None
        if runtime.sequence_parallel:
            hidden_N1H = gather_from_sequence_parallel_region(hidden_N1H)
        return hidden_N1H[:num_tokens].squeeze(1)

    def _receive(self, num_tokens: int) -> Tensor:
        """What the stage before made of `num_tokens` tokens."""
        runtime, config = self.runtime, self.model.config
        hidden_N1H = torch.empty(
            (num_tokens // runtime.sequence_size, 1, config.hidden_size),
            dtype=config.pipeline_dtype,
            device=runtime.device,
        )
        before = dist.get_global_rank(runtime.pp_group, (runtime.pp_rank - 1) % runtime.pp_size)
        dist.recv(hidden_N1H, before, group=runtime.pp_group)
        return hidden_N1H

    def _logits(self, hidden_BH: Tensor | None) -> Tensor | None:
        if hidden_BH is None:
            return None
        logits_BV = functional.linear(hidden_BH, self.model.head_weight())
        if self.runtime.tp_size > 1:
            group = self.runtime.tp_group
            shards = [torch.empty_like(logits_BV) for _ in range(group.size())]
            first = dist.get_global_rank(group, 0)
            dist.gather(logits_BV, shards if self.samples else None, first, group=group)
            logits_BV = torch.cat(shards, dim=-1)
        return logits_BV[:, : self.model.vocab_size].float() if self.samples else None


class _Batch:
    """Where the tokens of the current forward stand; one object for all layers' attention."""

    def __init__(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, device: torch.device):
        lengths_B = torch.tensor([len(prompt) for prompt in prompts])
        positions_N = torch.cat([torch.arange(len(prompt)) for prompt in prompts])
        rows_N = torch.arange(len(prompts)).repeat_interleave(lengths_B)
        tokens_N = torch.tensor([token for prompt in prompts for token in prompt])
        self.num_rows = len(prompts)
        self.length = int(lengths_B.max())
        """Keys in view: the longest row so far."""
        self.max_length = self.length + max_new_tokens
        self.prompt_tokens_N = tokens_N.to(device)
        self.rows_N = rows_N.to(device)
        self.positions_N = positions_N.to(device)
        self.last_B = (lengths_B.cumsum(0) - 1).to(device)
        """Index of each prompt's last token among the N."""
        self.visible_B11L: Tensor | None = None
        """Once there is one token a row: which keys it sees. Before: causal."""

    def advance(self) -> None:
        """From the prompts, or from one token a row, to the next token of every row."""
        if self.visible_B11L is None:
            self.rows_N = self.rows_N[self.last_B]
            self.positions_N = self.positions_N[self.last_B]
        self.positions_N = self.positions_N + 1
        self.length += 1
        keys_L = torch.arange(self.length, device=self.positions_N.device)
        self.visible_B11L = keys_L <= self.positions_N[:, None, None, None]


class _CachedAttention(torch.nn.Module):
    """Core attention over one layer's cached keys and values; takes Megatron's arguments.

    Query [N, 1, heads, D], key and value [N, 1, KV heads, D], rotated already, and padding behind
    them; the result is [N, 1, heads x D], and zeros for the padding.
    """

    def __init__(self, batch: _Batch, scale: float | None):
        super().__init__()
        self.batch = batch
        self.scale = scale
        self.keys_BGLD = self.values_BGLD = torch.empty(0)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *_masks: Any, **_mask_settings: Any
    ) -> Tensor:
        batch = self.batch
        place = (batch.rows_N, slice(None), batch.positions_N)
        num_tokens = batch.positions_N.numel()  # what follows them is padding
        (num_padded, _, num_heads, head_dim), num_groups = query.shape, key.size(2)
        query, key, value = query[:num_tokens], key[:num_tokens], value[:num_tokens]
        if not self.keys_BGLD.numel():
            # Zeros: the causal mask gives what is not written yet no weight, but 0 x NaN is NaN.
            shape = (batch.num_rows, num_groups, batch.max_length, head_dim)
            self.keys_BGLD, self.values_BGLD = key.new_zeros(shape), value.new_zeros(shape)
        self.keys_BGLD[place] = key.squeeze(1)
        self.values_BGLD[place] = value.squeeze(1)
        keys, values = self.keys_BGLD[:, :, : batch.length], self.values_BGLD[:, :, : batch.length]

        if batch.visible_B11L is not None:
            # The query heads that share a KV head see the same keys: they are its queries.
            query_BGRD = query.reshape(num_tokens, num_groups, -1, head_dim)
            context = functional.scaled_dot_product_attention(
                query_BGRD, keys, values, attn_mask=batch.visible_B11L, scale=self.scale
            )
        else:
            query_BSMD = query.new_zeros((batch.num_rows, batch.length, num_heads, head_dim))
            query_BSMD[batch.rows_N, batch.positions_N] = query.squeeze(1)
            context_BMSD = functional.scaled_dot_product_attention(
                query_BSMD.transpose(1, 2),
                keys,
                values,
                is_causal=True,
                scale=self.scale,
                enable_gqa=num_heads > num_groups,
            )
            context = context_BMSD[place]
        context = context.reshape(num_tokens, 1, num_heads * head_dim)
        return functional.pad(context, (0, 0, 0, 0, 0, num_padded - num_tokens))
