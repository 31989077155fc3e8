"""An output layer and a loss on top of it, run over chunks of tokens.

Shape letters: T flattened tokens, C tokens of a chunk, V vocabulary columns of this rank's shard,
H hidden.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from aropd_mcore.numerics.checks import check_main_grad, check_token_weights
from aropd_mcore.numerics.gradients import attach_gradients, wants_gradient
from aropd_mcore.numerics.passes import wide_dtype
from aropd_mcore.numerics.vocab_shard import VocabShard

LOGITS_BYTES = {"cpu": 128 * 2**20, "cuda": 3 * 2**29}
"""What the logits of an `auto` chunk may take, of all streams together. On a CPU more gains
nothing. A GPU adds to the weight's gradient once a chunk: with V = 128,256 an H200 took 5 % less
time for chunks of 2048 tokens than for the 1344 of 1 GiB, and another 2 % less for 2736."""

CPU_TILE = 512
"""Columns of a matrix product on a CPU: MKL was seen to multiply 320 tokens with 512 columns at a
time a fifth faster than with 32,768 at once (AMD, AVX-512)."""

ChunkLosses = Callable[[list[Tensor], Tensor | None, Tensor | None], dict[str, Tensor]]
"""(logits [C, V] of each stream, token ids [C], gradient weights [C]) -> loss_T and metrics [C].

With gradient weights it overwrites the first stream's logits by the weighted gradient."""


class Stream(NamedTuple):
    """Hidden states [T, H] and the shard of the output layer [V, H] that makes logits of them."""

    hidden_TH: Tensor
    weight_VH: Tensor


def weighted_sum_over_chunks(
    streams: Sequence[Stream],
    token_weights_T: Tensor,
    token_ids_T: Tensor | None,
    chunk_losses: ChunkLosses,
    *,
    shard: VocabShard,
    sequence_parallel: bool,
    chunk_tokens: int | Literal["auto"],
    main_grad_VH: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`chunk_losses` over all tokens, weighted and summed; the first stream gets the gradient.

    The arguments are those of `fused_linear_anchored_residual_kl`.
    """
    hidden_TH, weight_VH = streams[0]
    wide = wide_dtype(hidden_TH.dtype)
    if chunk_tokens == "auto":
        chunk_tokens = auto_chunk_tokens(len(streams), weight_VH, token_weights_T.numel())
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens {chunk_tokens}: expected at least 1, or auto")
    tokens = _Tokens(hidden_TH.size(0), chunk_tokens, shard.tp_group, sequence_parallel)
    check_token_weights(token_weights_T, tokens.total)
    check_main_grad(main_grad_VH, weight_VH, wide)

    wants_hidden, wants_weight = wants_gradient(hidden_TH), wants_gradient(weight_VH)
    with torch.no_grad():
        token_weights_T = token_weights_T.to(wide)
        scale = _gradient_scale(token_weights_T, hidden_TH.dtype)
        heads = _Heads(streams, shard.num_columns, tokens.chunk_size)
        grad_hidden_TH = torch.zeros_like(hidden_TH, dtype=wide) if wants_hidden else None
        grad_weight_VH = main_grad_VH if wants_weight else None
        if wants_weight and main_grad_VH is None:
            grad_weight_VH = torch.zeros_like(weight_VH, dtype=wide)
        found: list[dict[str, Tensor]] = []
        for rows in tokens.chunks():
            hidden = [tokens.gather(stream.hidden_TH[rows]) for stream in streams]
            logits = heads.project(hidden)
            gradient_weights_C = None
            if wants_hidden or wants_weight:
                gradient_weights_C = tokens.pick(token_weights_T, rows) * scale
            ids_C = None if token_ids_T is None else tokens.pick(token_ids_T, rows)
            found.append(chunk_losses(logits, ids_C, gradient_weights_C))
            if grad_hidden_TH is not None:  # first: its sum over the ranks takes time meanwhile
                grad_hidden_CH = heads.hidden_gradient(logits[0], wide, 1 / scale)
                tokens.start_sum(grad_hidden_TH[rows], grad_hidden_CH)
            if grad_weight_VH is not None:
                heads.add_weight_gradient(grad_weight_VH, logits[0], hidden[0], 1 / scale)
        tokens.finish_sum()
        metrics = {name: tokens.join([part[name] for part in found]) for name in found[0]}
        loss = (token_weights_T * metrics["loss_T"]).sum()

    pairs: list[tuple[Tensor, Tensor | None]] = []
    if wants_hidden:
        pairs.append((hidden_TH, grad_hidden_TH))
    if wants_weight:
        pairs.append((weight_VH, None if main_grad_VH is not None else grad_weight_VH))
    return attach_gradients(loss, *pairs), metrics


def auto_chunk_tokens(num_streams: int, weight_VH: Tensor, num_tokens: int) -> int:
    """Of chunks of equal size, as few as can be: `even_chunk` with LOGITS_BYTES.

    Columns are counted with padding, so that all ranks agree: every chunk has collectives.
    """
    device = "cuda" if weight_VH.is_cuda else "cpu"
    return even_chunk(
        device, num_streams * weight_VH.size(0) * weight_VH.element_size(), num_tokens
    )


def even_chunk(device: Literal["cpu", "cuda"], token_bytes: int, num_tokens: int) -> int:
    """Tokens of a chunk, a multiple of 64 whose logits fit into LOGITS_BYTES; at least 64.

    Equal chunks: one of the few tokens that are left over would cost the weight's gradient as much
    as a full one.
    """
    most = max(LOGITS_BYTES[device] // token_bytes // 64 * 64, 64)
    num_chunks = max(math.ceil(num_tokens / most), 1)
    return max(math.ceil(num_tokens / num_chunks / 64) * 64, 64)


class _Tokens:
    """The tokens of a loss, and which rank of the group holds the hidden states of which.

    With sequence parallelism each rank has an equal part. A chunk then takes the same rows of every
    part, so that all ranks work on every chunk and none holds more than it.
    """

    def __init__(self, num_rows: int, chunk_tokens: int, tp_group, sequence_parallel: bool):
        if sequence_parallel and tp_group is None:
            raise ValueError("sequence_parallel without tp_group: expected the ranks that share")
        self.num_rows = num_rows
        self.group = tp_group
        self.num_parts = tp_group.size() if sequence_parallel else 1
        self._chunk_rows = max(min(chunk_tokens // self.num_parts, num_rows), 1)
        self._summing: tuple[dist.Work, Tensor] | None = None

    @property
    def total(self) -> int:
        return self.num_rows * self.num_parts

    @property
    def chunk_size(self) -> int:
        return self._chunk_rows * self.num_parts

    def chunks(self) -> Iterator[slice]:
        """Rows of this rank's part. Without tokens one empty chunk: it still names every metric."""
        starts = range(0, max(self.num_rows, 1), self._chunk_rows)
        return (slice(start, min(start + self._chunk_rows, self.num_rows)) for start in starts)

    def gather(self, rows_RH: Tensor) -> Tensor:
        """The hidden states of a whole chunk. Collectives: an all-gather, if parallel."""
        if self.num_parts == 1 or not rows_RH.size(0):
            return rows_RH
        chunk_CH = rows_RH.new_empty(self.num_parts * rows_RH.size(0), rows_RH.size(1))
        parts = list(chunk_CH.chunk(self.num_parts))
        dist.all_gather(parts, rows_RH.contiguous(), group=self.group)
        return chunk_CH

    def pick(self, numbers_T: Tensor, rows: slice) -> Tensor:
        """Of a tensor of all tokens, a chunk's."""
        return numbers_T.view(self.num_parts, self.num_rows)[:, rows].flatten()

    def join(self, chunks: list[Tensor]) -> Tensor:
        """A tensor of all tokens from every chunk's."""
        parts = [chunk.unflatten(0, (self.num_parts, -1)) for chunk in chunks if len(chunk)]
        return torch.cat(parts, dim=1).flatten(0, 1) if parts else chunks[0]

    def start_sum(self, out_RH: Tensor, chunk_CH: Tensor) -> None:
        """Into `out_RH`, this rank's rows of a chunk, summed over the ranks: each has seen its own
        columns of the vocabulary only. Collectives: a reduce-scatter if parallel, else an
        all-reduce; the sum of the chunk before it is waited for."""
        self.finish_sum()
        if self.num_parts == 1:
            out_RH.copy_(chunk_CH)
        if self.group is None or not chunk_CH.numel():
            return
        if self.num_parts == 1:
            work = dist.all_reduce(out_RH, group=self.group, async_op=True)
        else:
            parts = list(chunk_CH.chunk(self.num_parts))
            work = dist.reduce_scatter(out_RH, parts, group=self.group, async_op=True)
        assert work is not None
        self._summing = (work, chunk_CH)  # which must live as long as it is read

    def finish_sum(self) -> None:
        if self._summing is not None:
            self._summing[0].wait()
            self._summing = None


class _Heads:
    """The output layers of all streams, and the buffer that holds a chunk's logits."""

    def __init__(self, streams: Sequence[Stream], num_columns: int, chunk_size: int):
        self.weights = [stream.weight_VH[:num_columns] for stream in streams]
        weights = [stream.weight_VH for stream in streams]
        # A row is as long as with padding: a GPU multiplies faster into aligned rows.
        rows = weights[0].new_empty(len(streams), chunk_size, weights[0].size(0))
        self.logits = rows[..., :num_columns]
        self._owners = [(weight_VH.data_ptr(), weight_VH.shape) for weight_VH in weights]

    def project(self, hidden: Sequence[Tensor]) -> list[Tensor]:
        """Logits [C, V] of each stream; neighbours with one weight share one matrix product."""
        num_tokens, done = hidden[0].size(0), 0
        logits = self.logits.flatten(0, 1)[: len(hidden) * num_tokens]
        for _, streams in groupby(range(len(hidden)), key=self._owners.__getitem__):
            shared = list(streams)
            stacked = torch.cat([hidden[k] for k in shared])
            rows = logits[done : done + len(stacked)]
            for columns in _tiles(rows):
                torch.mm(stacked, self.weights[shared[0]][columns].T, out=rows[:, columns])
            done += len(stacked)
        return list(logits.unflatten(0, (len(hidden), num_tokens)).unbind())

    def add_weight_gradient(
        self, grad_VH: Tensor, gradient_CV: Tensor, hidden_CH: Tensor, scale: float
    ) -> None:
        """grad += scale * gradient^T @ hidden, of the first stream."""
        for columns in _tiles(gradient_CV):
            _add_product(grad_VH[columns], gradient_CV[:, columns].T, hidden_CH, scale)

    def hidden_gradient(self, gradient_CV: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
        """scale * gradient @ weight, of the first stream, from this rank's columns."""
        weight_VH = self.weights[0]
        grad_CH = gradient_CV.new_zeros(gradient_CV.size(0), weight_VH.size(1), dtype=dtype)
        for columns in _tiles(gradient_CV):
            _add_product(grad_CH, gradient_CV[:, columns], weight_VH[columns], scale)
        return grad_CH


def _tiles(logits_CV: Tensor) -> Iterator[slice]:
    """Columns that are multiplied at a time: on a GPU all of them."""
    num_columns = logits_CV.size(1)
    step = num_columns if logits_CV.is_cuda else CPU_TILE
    starts = range(0, num_columns, max(step, 1))
    return (slice(start, min(start + step, num_columns)) for start in starts)


def _add_product(sum_: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """sum += scale * left @ right, accumulated in the sum's dtype, which is at least fp32."""
    if left.is_cuda and left.dtype != sum_.dtype:
        torch.addmm(sum_, left, right, out_dtype=sum_.dtype, alpha=scale, out=sum_)
    else:
        sum_.addmm_(left.to(sum_.dtype), right.to(sum_.dtype), alpha=scale)


def _gradient_scale(token_weights_T: Tensor, dtype: torch.dtype) -> float:
    """A power of two to form the logits' gradient with: in fp16, 1 / tokens and less would vanish.

    The largest weight becomes 2^7 to 2^8, since a gradient of the reverse KL can exceed 1.
    """
    if dtype != torch.float16 or not token_weights_T.numel():
        return 1.0
    largest = float(token_weights_T.abs().max())
    return 2.0 ** (8 - math.ceil(math.log2(largest))) if 0 < largest < math.inf else 1.0
