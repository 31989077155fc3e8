"""Decoding with a KV cache by the model's own forward, on any tensor x pipeline layout.

Tokens pass the layers packed: the N tokens of a forward, of any rows, are N positions of one
sequence, [N, 1, H]. All layers but core attention process each token separately, and rotary angles
are given per token. While decoding, core attention is replaced by a module that caches each row's
keys and values.

This has two effects:

- No padding passes the model, except to round N up.
- Each row counts its positions from 0, as in training.

`Decoder.prefill` passes whole prompts, and `Decoder.next_logits` one token of each row. The shapes
of the latter depend only on the number of rows and of keys. It reads and writes tensors that keep
their addresses, and it neither reads values on the host nor copies any from there. Therefore a CUDA
graph can capture it, and attention kernels meet few shapes.

Megatron's StaticInferenceContext keeps all rows at one length instead. It pads prompts on the left,
and Transformer Engine's attention does not mask this padding after the first forward
(transformer/attention.py, AttnMaskType.no_mask). It also rotates all keys again for every token.

Shape letters: N tokens of a forward, B rows, G KV heads, L keys of a row, H hidden, D head
dimension, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import sdpa_kernel

from aropd_mcore.mcore.cached_attention import CachedAttention, KVCache, Places
from aropd_mcore.mcore.model import StageModel
from aropd_mcore.mcore.patches.local_attention import ATTENTION_KERNELS, window_of_layer
from aropd_mcore.mcore.runtime import Runtime


@contextmanager
def decoding(
    model: StageModel,
    runtime: Runtime,
    *,
    num_rows: int,
    max_length: int,
    cache: KVCache | None = None,
) -> Iterator["Decoder"]:
    """Context that yields a Decoder and restores the model afterwards.

    Inside, the model is in evaluation mode, without gradient, and its core attention is replaced.
    The KV cache has num_rows x max_length x KV heads x (dimensions of a key and of a value) numbers
    per layer, and with attention sinks one more place per row. Latent attention caches keys and
    values, not the latent vectors.

    The mode is torch.no_grad, not inference_mode, because Megatron caches rotary tables, and its
    fused rotary embedding cannot save an inference tensor for backward.

    Args:
        num_rows: largest number of rows that are decoded at once.
        max_length: largest number of tokens of a row, prompt and response together.
        cache: memory of the KV cache, which stays allocated afterwards. None: memory that is freed
            with the Decoder.
    """
    attentions: list[Any] = [layer.self_attention for layer in model.layers]
    stock = [attention.core_attention for attention in attentions]
    was_training = model.training
    model.eval()
    config, architecture = model.config, model.architecture
    length = max_length + int(architecture.has_sinks)
    shape = (len(attentions), num_rows, architecture.num_kv_heads // runtime.tp_size, length)
    dims = (architecture.head_dim, architecture.value_dim)
    sizes = [math.prod(shape) * dim for dim in dims]
    numbers = (cache or KVCache()).view(
        (sum(sizes),), dtype=config.params_dtype, device=runtime.device
    )
    keys_KBGLD, values_KBGLD = (
        part.view(*shape, dim) for part, dim in zip(numbers.split(sizes), dims, strict=True)
    )
    windows = [window_of_layer(config, attention.layer_number) for attention in attentions]
    places = Places(window=next((size for size in windows if size is not None), None))
    try:
        layers = zip(attentions, keys_KBGLD, values_KBGLD, windows, strict=True)
        for attention, keys_BGLD, values_BGLD, window in layers:
            attention.core_attention = CachedAttention(
                places,
                keys_BGLD,
                values_BGLD,
                config.softmax_scale,
                has_window=window is not None,
                sinks=getattr(attention.core_attention, "softmax_offset", None),
            )
        for chunk in model:
            # Transformer Engine caches FP8 copies of the weights. This makes it cast them again.
            chunk.set_is_first_microbatch()
        with torch.no_grad(), sdpa_kernel(ATTENTION_KERNELS):
            yield Decoder(model, runtime, places, (keys_KBGLD, values_KBGLD))
    finally:
        for attention, core_attention in zip(attentions, stock, strict=True):
            attention.core_attention = core_attention
        model.train(was_training)


class Decoder:
    """Decoder that fills rows with prompts and computes logits of the next token of every row.

    Logits are gathered on the sampling rank of the replica. `share` broadcasts its samples.
    """

    def __init__(
        self,
        model: StageModel,
        runtime: Runtime,
        places: Places,
        caches_KBGLD: tuple[Tensor, Tensor],
    ):
        """
        Args:
            places: object that the attention of all layers reads.
            caches_KBGLD: keys and values of the K layers.
        """
        self.model = model
        self.runtime = runtime
        self._places = places
        self._caches_KBGLD = caches_KBGLD
        self.chunks = list(model)
        """Chunks of layers of this stage: more than one with a virtual pipeline."""
        # `packed_seq`: angles of all positions, not only of this context rank's.
        rotary = self.chunks[0].rotary_pos_emb
        self._first = int(model.architecture.has_sinks)
        self._max_length = caches_KBGLD[0].size(-2) - self._first
        self._angles = rotary(self._max_length, packed_seq=True)
        self._outgoing_N1H: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """Tensors that `next_logits` reads besides its arguments."""
        return [*self.model.parameters(), *self.model.buffers(), *self._caches_KBGLD, self._angles]

    def prefill(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Cache the keys and values of whole prompts, from position 0 of these rows.

        The stages work one after another.

        Args:
            rows: one per prompt.
            prompts: at least one token each. Sort them by length for speed: neighbours of similar
                length share a call of the attention kernel.
        Collectives: the model's own over tp_group, and sends of hidden states between stages.
        """
        self._pass(self._places.place_prompts(rows, prompts, self.runtime.device))

    def cache_next(self, rows: slice, tokens_B: Tensor, positions_B: Tensor, num_keys: int) -> None:
        """Cache the keys and values of one token of each of the B rows, without its logits.

        The stages work one after another. Arguments are those of `next_logits`.

        Collectives: the model's own over tp_group, and sends of hidden states between stages.
        """
        self._place_next(rows, positions_B, num_keys)
        self._pass(tokens_B)

    def copy(self, sources: Sequence[int], targets: Sequence[int], num_keys: int) -> None:
        """Copy the first num_keys keys and values of rows to other rows."""
        for cache_KBGLD in self._caches_KBGLD:
            for cache_BGLD in cache_KBGLD[..., : self._first + num_keys, :]:
                cache_BGLD[targets] = cache_BGLD[sources]

    def next_logits(
        self, chunk: int, rows: slice, tokens_B: Tensor, positions_B: Tensor, num_keys: int
    ) -> Tensor | None:
        """Pass one token of each of the B rows through one of this stage's chunks of layers.

        A chunk that is not the model's first one receives the hidden states of the chunk before it.
        Those of this chunk are sent at the next call of this method or of `send`.

        Args:
            chunk: index in `chunks`.
            tokens_B: int64, on the device, the same on every rank of the replica.
            positions_B: position of each token in its row, int64 on the device. Keys of later
                positions are not visible.
            num_keys: number of keys that attention reads, at most: more than every position.
        Returns:
            Logits of the token after each: [B, vocab_size] fp32 on the sampling rank after the
            model's last chunk, else None.
        Collectives: the model's own over tp_group, a send to the next stage, a receive from the
            previous one, and a gather of [B, V / tp] over the last stage's tp_group.
        """
        self._place_next(rows, positions_B, num_keys)
        hidden_BH = self._forward(chunk, tokens_B)
        return _next_token_logits(self.model, self.runtime, hidden_BH)

    def send(self) -> None:
        """Send the hidden states of the last pass to the next stage, unless they have been sent."""
        self._exchange(None)

    def _place_next(self, rows: slice, positions_B: Tensor, num_keys: int) -> None:
        num_keys = min(num_keys, self._max_length)
        self._places.place_next(rows, positions_B, num_keys, self._caches_KBGLD[0].dtype)

    def _pass(self, tokens_N: Tensor) -> None:
        """Pass the placed tokens through all chunks, one after another."""
        for chunk in range(len(self.chunks)):
            self._forward(chunk, tokens_N)
            self.send()

    def _forward(self, chunk_index: int, tokens_N: Tensor) -> Tensor | None:
        """Return final hidden states [N, H] of the model's last chunk, None of other chunks.

        N is padded to the multiple that FP8 matrix products and sequence parallelism need. Under
        sequence parallelism each tensor rank holds its part of the tokens between matrix products
        and between stages.
        """
        runtime, num_tokens, chunk = self.runtime, tokens_N.numel(), self.chunks[chunk_index]
        padding = (0, -num_tokens % (runtime.token_multiple * runtime.sequence_size))
        tokens_N = functional.pad(tokens_N, padding)
        positions_N = functional.pad(self._places.positions_N, padding)
        hidden_N1H = None
        received_N1H = self._exchange(None if chunk.pre_process else tokens_N.numel())
        if received_N1H is None:
            hidden_N1H = chunk.embedding(tokens_N[None], positions_N[None])
        else:
            chunk.decoder.set_input_tensor(received_N1H)
        hidden_N1H = chunk.decoder(
            hidden_states=hidden_N1H,
            attention_mask=None,
            rotary_pos_emb=self._angles[positions_N],
        )
        if not chunk.post_process:
            self._outgoing_N1H = hidden_N1H
            return None
        if runtime.sequence_parallel:
            hidden_N1H = gather_from_sequence_parallel_region(hidden_N1H)
        return hidden_N1H[:num_tokens].squeeze(1)

    def _exchange(self, num_tokens: int | None) -> Tensor | None:
        """Send the hidden states of the last pass, and receive the previous stage's of num_tokens.

        Both are one batch, since stages of a virtual pipeline may send to each other.
        """
        runtime, config, received = self.runtime, self.model.config, None
        transfers = []

        def add(transfer: Callable, tensor: Tensor, distance: int) -> None:
            stage = (runtime.pp_rank + distance) % runtime.pp_size
            rank = dist.get_global_rank(runtime.pp_group, stage)
            transfers.append(dist.P2POp(transfer, tensor, rank, group=runtime.pp_group))

        if self._outgoing_N1H is not None:
            add(dist.isend, self._outgoing_N1H, 1)
        if num_tokens is not None:
            received = torch.empty(
                (num_tokens // runtime.sequence_size, 1, config.hidden_size),
                dtype=config.pipeline_dtype,
                device=runtime.device,
            )
            add(dist.irecv, received, -1)
        if transfers:
            for request in dist.batch_isend_irecv(transfers):
                request.wait()
        self._outgoing_N1H = None
        return received


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
