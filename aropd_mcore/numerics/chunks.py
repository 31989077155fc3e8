"""Output layer and loss, computed chunk by chunk over the tokens.

Logits are fp32 (fp64 for fp64), also for hidden states in half precision: the products of half
numbers are accumulated in fp32 and not rounded. Rounded to bf16, logits of 16 to 32 are off by up
to 0.06 nats, which exceeds the loss itself where the target is close to the student. The gradient
is rounded to the hidden states' dtype, in which the two products with it are faster.

Shape letters: T flattened tokens, C tokens of a chunk, V vocabulary columns of this rank's shard,
H hidden.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from aropd_mcore.numerics.checks import check_main_grad, check_token_weights
from aropd_mcore.numerics.gradients import attach_gradients, wants_gradient
from aropd_mcore.numerics.passes import wide_dtype
from aropd_mcore.numerics.threads import on_threads
from aropd_mcore.numerics.vocab_shard import VocabShard

LOGITS_BYTES = {"cpu": 128 * 2**20, "cuda": 3 * 2**29}
"""Largest size of an `auto` chunk's logits, over all streams, and of their gradient. On a CPU a
larger chunk gains nothing. A GPU adds to the weight's gradient once per chunk: with V = 128,256 and
logits in bf16, an H200 took 5 % less time with chunks of 2048 tokens than with 1344, and another
2 % less with 2736. Chunks of fp32 logits have not been timed."""

CPU_TILE = 512
"""Number of columns per matrix product on a CPU. One thread computes a product, as in
numerics.threads. With 320 tokens, MKL was a fifth faster with 512 columns at a time than with
32,768 at once (AMD, AVX-512)."""


class Gradient(NamedTuple):
    """Destination of the weighted gradient of a chunk's loss to the first stream's logits."""

    weights_C: Tensor
    out_CV: Tensor
    """In the hidden states' dtype. The logits themselves, if they have the same dtype."""


ChunkLosses = Callable[[list[Tensor], Tensor | None, Gradient | None], dict[str, Tensor]]
"""Function (logits [C, V] of each stream, token ids [C], gradient) -> loss_T and metrics, [C] each.
It writes the gradient if there is a destination."""


class Stream(NamedTuple):
    """Hidden states [T, H] and the output layer's shard [V, H] that projects them to logits."""

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
    """Sum the weighted `chunk_losses` over all tokens, with gradients to the first stream.

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
        heads = _Heads(
            streams,
            shard.num_columns,
            tokens.chunk_size,
            with_gradient=wants_hidden or wants_weight,
        )
        grad_hidden_TH = torch.zeros_like(hidden_TH, dtype=wide) if wants_hidden else None
        grad_weight_VH = main_grad_VH if wants_weight else None
        if wants_weight and main_grad_VH is None:
            grad_weight_VH = torch.zeros_like(weight_VH, dtype=wide)
        parts: list[dict[str, Tensor]] = []
        for rows in tokens.chunks():
            hidden = [tokens.gather(stream.hidden_TH[rows]) for stream in streams]
            logits = heads.project(hidden)
            gradient = None
            if heads.gradient is not None:
                weights_C = tokens.pick(token_weights_T, rows) * scale
                gradient = Gradient(weights_C, heads.gradient[: weights_C.numel()])
            ids_C = None if token_ids_T is None else tokens.pick(token_ids_T, rows)
            parts.append(chunk_losses(logits, ids_C, gradient))
            if gradient is None:
                continue
            if grad_hidden_TH is not None:  # first: its sum over the ranks overlaps what follows
                grad_hidden_CH = heads.hidden_gradient(gradient.out_CV, wide, 1 / scale)
                tokens.start_sum(grad_hidden_TH[rows], grad_hidden_CH)
            if grad_weight_VH is not None:
                heads.add_weight_gradient(grad_weight_VH, gradient.out_CV, hidden[0], 1 / scale)
        tokens.finish_sum()
        metrics = {name: tokens.join([part[name] for part in parts]) for name in parts[0]}
        loss = (token_weights_T * metrics["loss_T"]).sum()

    pairs: list[tuple[Tensor, Tensor | None]] = []
    if wants_hidden:
        pairs.append((hidden_TH, grad_hidden_TH))
    if wants_weight:
        pairs.append((weight_VH, None if main_grad_VH is not None else grad_weight_VH))
    return attach_gradients(loss, *pairs), metrics


def auto_chunk_tokens(num_streams: int, weight_VH: Tensor, num_tokens: int) -> int:
    """Return the `even_chunk` of these streams.

    Columns are counted with padding, so that all ranks agree on the number of chunks. They must,
    since every chunk has collectives.
    """
    device = "cuda" if weight_VH.is_cuda else "cpu"
    token_bytes = logits_bytes(num_streams, weight_VH.size(0), weight_VH.element_size())
    return even_chunk(device, token_bytes, num_tokens)


def logits_bytes(num_streams: int, num_columns: int, dtype_bytes: int) -> int:
    """Return the bytes of one token's logits in every stream, and of their gradient.

    Args:
        dtype_bytes: bytes per number of the hidden states. Up to 2, the gradient has a buffer of
            its own. Otherwise it overwrites the first stream's logits.
    """
    wide = max(dtype_bytes, 4)
    gradient = dtype_bytes if dtype_bytes < wide else 0
    return num_columns * (num_streams * wide + gradient)


def even_chunk(device: Literal["cpu", "cuda"], token_bytes: int, num_tokens: int) -> int:
    """Return the chunk size, for as few chunks of equal size as fit into LOGITS_BYTES.

    It is a multiple of 64, at least 64. Chunks are equal because a small remainder would cost as
    much as a full chunk in the weight's gradient.
    """
    most = max(LOGITS_BYTES[device] // token_bytes // 64 * 64, 64)
    num_chunks = max(math.ceil(num_tokens / most), 1)
    return max(math.ceil(num_tokens / num_chunks / 64) * 64, 64)


class _Tokens:
    """The tokens of a loss, and how the ranks of the group share their hidden states.

    With sequence parallelism each rank holds an equal part of the tokens. A chunk then takes the
    same rows of every part, so that all ranks work on every chunk and hold no more than one chunk.
    """

    def __init__(self, num_rows: int, chunk_tokens: int, tp_group, sequence_parallel: bool):
        if sequence_parallel and tp_group is None:
            raise ValueError(
                "sequence_parallel without tp_group: expected the group of ranks that share the "
                "tokens; pass tp_group"
            )
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
        """Yield the rows of this rank's part by chunk; one empty chunk if there are no tokens.

        The empty chunk provides the names of the metrics.
        """
        starts = range(0, max(self.num_rows, 1), self._chunk_rows)
        return (slice(start, min(start + self._chunk_rows, self.num_rows)) for start in starts)

    def gather(self, rows_RH: Tensor) -> Tensor:
        """Return the hidden states of a whole chunk.

        Collectives: an all-gather with sequence parallelism.
        """
        if self.num_parts == 1 or not rows_RH.size(0):
            return rows_RH
        chunk_CH = rows_RH.new_empty(self.num_parts * rows_RH.size(0), rows_RH.size(1))
        parts = list(chunk_CH.chunk(self.num_parts))
        dist.all_gather(parts, rows_RH.contiguous(), group=self.group)
        return chunk_CH

    def pick(self, numbers_T: Tensor, rows: slice) -> Tensor:
        """Select a chunk from a tensor of all tokens."""
        return numbers_T.view(self.num_parts, self.num_rows)[:, rows].flatten()

    def join(self, chunks: list[Tensor]) -> Tensor:
        """Join the tensors of all chunks into one of all tokens."""
        parts = [chunk.unflatten(0, (self.num_parts, -1)) for chunk in chunks if len(chunk)]
        return torch.cat(parts, dim=1).flatten(0, 1) if parts else chunks[0]

    def start_sum(self, out_RH: Tensor, chunk_CH: Tensor) -> None:
        """Start summing a chunk's gradient over the ranks; `out_RH` gets this rank's rows.

        A rank's summand covers only its own columns of the vocabulary. The sum of the previous
        chunk is waited for first.

        Collectives: a reduce-scatter with sequence parallelism, else an all-reduce; asynchronous.
        """
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
        self._summing = (work, chunk_CH)  # chunk_CH must live until the collective has read it

    def finish_sum(self) -> None:
        if self._summing is not None:
            self._summing[0].wait()
            self._summing = None


class _Heads:
    """Output layers of all streams, and the buffers of a chunk's logits and their gradient."""

    def __init__(
        self, streams: Sequence[Stream], num_columns: int, chunk_size: int, *, with_gradient: bool
    ):
        self.weights = [stream.weight_VH[:num_columns] for stream in streams]
        weights = [stream.weight_VH for stream in streams]
        # Rows have the padded length, since a GPU multiplies faster into aligned rows.
        shape = (len(streams), chunk_size, weights[0].size(0))
        dtype = wide_dtype(weights[0].dtype)
        self.logits = weights[0].new_empty(shape, dtype=dtype)[..., :num_columns]
        self.gradient: Tensor | None = None
        """Buffer of the gradient to the first stream's logits, [chunk_size, num_columns]."""
        if with_gradient and weights[0].dtype == dtype:
            self.gradient = self.logits[0]
        elif with_gradient:
            self.gradient = weights[0].new_empty(shape[1:])[..., :num_columns]
        self._owners = [(weight_VH.data_ptr(), weight_VH.shape) for weight_VH in weights]

    def project(self, hidden: Sequence[Tensor]) -> list[Tensor]:
        """Return the logits [C, V] of each stream, into the buffer.

        Consecutive streams with the same weight share one matrix product.
        """
        num_tokens, done = hidden[0].size(0), 0
        logits = self.logits.flatten(0, 1)[: len(hidden) * num_tokens]
        for _, streams in groupby(range(len(hidden)), key=self._owners.__getitem__):
            shared = list(streams)
            stacked = torch.cat([hidden[k] for k in shared])
            weight_VH, rows = self.weights[shared[0]], logits[done : done + len(stacked)]
            write = partial(_write_tile, rows, stacked, weight_VH)
            on_threads(write, list(_tiles(rows)), rows.device)
            done += len(stacked)
        return list(logits.unflatten(0, (len(hidden), num_tokens)).unbind())

    def add_weight_gradient(
        self, grad_VH: Tensor, gradient_CV: Tensor, hidden_CH: Tensor, scale: float
    ) -> None:
        """Add scale * gradient^T @ hidden of the first stream to `grad_VH`."""

        def add(columns: slice) -> None:
            _add_product(grad_VH[columns], gradient_CV[:, columns].T, hidden_CH, scale)

        on_threads(add, list(_tiles(gradient_CV)), gradient_CV.device)

    def hidden_gradient(self, gradient_CV: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
        """Return scale * gradient @ weight of the first stream, from this rank's columns."""
        weight_VH = self.weights[0]
        grad_CH = gradient_CV.new_zeros(gradient_CV.size(0), weight_VH.size(1), dtype=dtype)

        def add(tokens: slice) -> None:
            for columns in _tiles(gradient_CV):
                left, right = gradient_CV[tokens, columns], weight_VH[columns]
                _add_product(grad_CH[tokens], left, right, scale)

        on_threads(add, _token_shares(gradient_CV), gradient_CV.device)
        return grad_CH


def _tiles(logits_CV: Tensor) -> Iterator[slice]:
    """Yield the columns of each matrix product: all of them on a GPU, CPU_TILE on a CPU."""
    num_columns = logits_CV.size(1)
    step = num_columns if logits_CV.is_cuda else CPU_TILE
    starts = range(0, num_columns, max(step, 1))
    return (slice(start, min(start + step, num_columns)) for start in starts)


def _token_shares(logits_CV: Tensor) -> list[slice]:
    """Split a chunk's tokens over the threads of a CPU, in shares of 64 tokens or more."""
    num_tokens = logits_CV.size(0)
    num_shares = 1 if logits_CV.is_cuda else torch.get_num_threads()
    size = max(math.ceil(num_tokens / num_shares), 64)
    return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]


def _write_tile(out: Tensor, hidden_CH: Tensor, weight_VH: Tensor, columns: slice) -> None:
    _write_product(out[:, columns], hidden_CH, weight_VH[columns].T)


def _write_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Write left @ right to `out`, accumulated and kept in its dtype, which is at least fp32."""
    if left.is_cuda and left.dtype != out.dtype:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:  # a CPU has no products with another dtype of the result
        torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)


def _add_product(sum_: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """Add scale * left @ right to `sum_`, accumulated in its dtype, which is at least fp32."""
    if left.is_cuda and left.dtype != sum_.dtype:
        torch.addmm(sum_, left, right, out_dtype=sum_.dtype, alpha=scale, out=sum_)
    else:
        sum_.addmm_(left.to(sum_.dtype), right.to(sum_.dtype), alpha=scale)


def _gradient_scale(token_weights_T: Tensor, dtype: torch.dtype) -> float:
    """Return the power of two that the gradient of the logits is multiplied by until it is used.

    In fp16, weights such as 1 / tokens would underflow. The largest weight becomes 2^7 to 2^8,
    and not more, since a gradient of the reverse KL can exceed 1.
    """
    if dtype != torch.float16 or not token_weights_T.numel():
        return 1.0
    largest = float(token_weights_T.abs().max())
    return 2.0 ** (8 - math.ceil(math.log2(largest))) if 0 < largest < math.inf else 1.0
