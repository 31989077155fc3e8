"""The passes in Triton, for GPUs. `passes.TorchPasses` documents what they return.

A program processes one token. It reads the token's rows once, in blocks of columns. The columns of
a block are split over lanes, and each lane keeps its own maxima and sums:

    block [L, C]:  L lanes, C neighbouring columns that a lane loads at once

A lane is a GPU thread, so no thread waits for another before the end of the row. When a lane's
maximum of view k grows by d_k, its sums are moved to the new maximum:

    sum_k     <- exp(-d_k) sum_k                           sum_k = sum_v exp(x_kv - max_k)
    moment_ab <- exp(-d_a) (moment_ab - d_b sum_a)         moment_ab: see `view_statistics`

At the end the sums of all lanes are moved to the row's maximum and added. Logits of -inf, and the
columns of a block that is not full, need masks. Full blocks are first computed without masks. If
the result is not finite, the whole row is computed again with masks (CAREFUL).

Arithmetic and results are fp32. All blocks have one size and there are no atomic additions, so the
same logits give the same bits.

Shape letters: T flattened tokens, V vocabulary columns of this rank's shard (without padding), K
numbers per token. In kernels a token is a row; L and C are as above.
"""

# pyright: reportCallIssue=false
# A launch takes options, such as num_warps, that are not parameters of the kernel.

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from aropd_mcore.numerics.kernel_blocks import (
    BLOCK,
    LANES,
    LOWEST,
    TARGET,
    are_finite,
    block_columns,
    exp,
    expectation,
    lane_sums,
    load,
    load_views,
    log_mixture,
    log_softmax,
    log_student_and_target,
    log_target,
    move,
    normalizer,
    normalizers,
    pointers,
    product,
    shift,
)
from aropd_mcore.numerics.loss_settings import LossSettings
from aropd_mcore.numerics.passes import MOMENTS, Softmax, ViewLogits

NUM_WARPS = LANES.value // 32
SIZES = ["num_tokens", "num_columns"]  # kernels are compiled once for all sizes


class Matrix(NamedTuple):
    """A tensor [T, V] with its strides, as an argument of kernels."""

    data: Tensor
    row_stride: int
    column_stride: int


def view_statistics(views: ViewLogits, moments: Sequence[tuple[int, int]]) -> Tensor:
    assert tuple(moments) in ((), MOMENTS), moments
    out_KT = _empty_numbers(6 + len(moments), views.student)
    with torch.cuda.device_of(out_KT):
        _view_statistics[(out_KT.size(1),)](
            out_KT, *_sizes(views), WITH_MOMENTS=bool(moments), num_warps=NUM_WARPS
        )
    return out_KT


def student_statistics(student_TV: Tensor) -> Tensor:
    num_tokens, num_columns = student_TV.shape
    out_KT = _empty_numbers(3, student_TV)
    with torch.cuda.device_of(out_KT):
        _student_statistics[(num_tokens,)](
            out_KT, _matrix(student_TV), num_tokens, num_columns, num_warps=NUM_WARPS
        )
    return out_KT


def target_statistics(
    views: ViewLogits,
    softmax: Softmax,
    objective: LossSettings,
    *,
    with_metrics: bool,
    least_top_2T: Tensor | None,
) -> Tensor:
    out_KT = _empty_numbers(6, views.student)
    with torch.cuda.device_of(out_KT):
        _target_statistics[(out_KT.size(1),)](
            out_KT,
            *_sizes(views),
            _contiguous(softmax),
            None if least_top_2T is None else least_top_2T.contiguous(),
            **_residual(objective),
            WITH_TARGET_RATIO=with_metrics or objective.divergence == "kl_target_student",
            WITH_STUDENT_RATIO=objective.divergence == "kl_student_target",
            WITH_CLIPPED=with_metrics and objective.residual_clip is not None,
            num_warps=NUM_WARPS,
        )
    return out_KT


def mixture_statistics(views: ViewLogits, softmax: Softmax, objective: LossSettings) -> Tensor:
    out_KT = _empty_numbers(2, views.student)
    with torch.cuda.device_of(out_KT):
        _mixture_statistics[(out_KT.size(1),)](
            out_KT,
            *_sizes(views),
            _contiguous(softmax),
            **_residual(objective),
            **_mixture(objective),
            num_warps=NUM_WARPS,
        )
    return out_KT


def write_gradient(
    out_TV: Tensor,
    views: ViewLogits,
    softmax: Softmax,
    kl_student_T: Tensor,
    objective: LossSettings,
    weights_T: Tensor,
) -> None:
    num_tokens, num_columns = out_TV.shape
    with torch.cuda.device_of(out_TV):
        _write_gradient[(num_tokens, triton.cdiv(num_columns, BLOCK.value))](
            _matrix(out_TV),
            *_sizes(views),
            _contiguous(softmax),
            kl_student_T.contiguous(),
            weights_T.contiguous(),
            **_residual(objective),
            **_mixture(objective),
            student_share=objective.student_share,
            DIVERGENCE=objective.divergence,
            num_warps=NUM_WARPS,
        )


def write_cross_entropy_gradient(
    out_TV: Tensor, student_TV: Tensor, softmax: Softmax, columns_T: Tensor, weights_T: Tensor
) -> None:
    num_tokens, num_columns = out_TV.shape
    with torch.cuda.device_of(out_TV):
        _write_cross_entropy_gradient[(num_tokens, triton.cdiv(num_columns, BLOCK.value))](
            _matrix(out_TV),
            _matrix(student_TV),
            num_tokens,
            num_columns,
            _contiguous(softmax),
            columns_T.contiguous(),
            weights_T.contiguous(),
            num_warps=NUM_WARPS,
        )


def _empty_numbers(num_numbers: int, logits_TV: Tensor) -> Tensor:
    assert logits_TV.dtype in (torch.float16, torch.bfloat16, torch.float32)
    return logits_TV.new_empty((num_numbers, logits_TV.size(0)), dtype=torch.float32)


def _matrix(tensor_TV: Tensor) -> Matrix:
    return Matrix(tensor_TV, *tensor_TV.stride())


def _sizes(views: ViewLogits) -> tuple[ViewLogits, int, int]:
    num_tokens, num_columns = views.student.shape
    return ViewLogits._make(map(_matrix, views)), num_tokens, num_columns


def _contiguous(softmax: Softmax) -> Softmax:
    return Softmax(*(numbers_KT.contiguous() for numbers_KT in softmax))


def _residual(objective: LossSettings) -> dict[str, float | str]:
    """Return the case of log u, which selects a compiled kernel, and its run-time numbers."""
    scale, clip = float(objective.residual_scale), objective.residual_clip
    if scale == 0:
        case = "none"
    elif clip is not None:
        case = "clipped"
    else:
        case = "all" if scale == 1 else "scaled"
    return {"scale": scale, "clip": float(clip or 0), "RESIDUAL": case}


def _mixture(objective: LossSettings) -> dict[str, float]:
    beta = objective.jsd_weight
    return {"log_student_share": math.log1p(-beta), "log_target_share": math.log(beta)}


@triton.jit(do_not_specialize=SIZES)
def _view_statistics(out_KT, views, num_tokens, num_columns, WITH_MOMENTS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    block = block_columns()
    low, zero = tl.full((LANES,), LOWEST, tl.float32), tl.full((LANES,), 0.0, tl.float32)
    max_s, max_p, max_f, sum_s, sum_p, sum_f = low, low, low, zero, zero, zero
    ss, pp, ff, ps, fs, fp = zero, zero, zero, zero, zero, zero
    begin, end = 0, num_columns // BLOCK * BLOCK
    for CAREFUL in tl.static_range(2):
        if CAREFUL:
            begin, end = end, num_columns
            if not are_finite(sum_s + sum_p + sum_f + (ss + pp + ff) + (ps + fs + fp)):
                begin *= 0
                max_s, max_p, max_f, sum_s, sum_p, sum_f = low, low, low, zero, zero, zero
                ss, pp, ff, ps, fs, fp = zero, zero, zero, zero, zero, zero
        for start in range(begin, end, BLOCK):
            x_s, x_p, x_f = load_views(views, row, start + block, num_columns, CAREFUL)
            max_s, d_s, x_s, e_s = shift(x_s, max_s)
            max_p, d_p, x_p, e_p = shift(x_p, max_p)
            max_f, d_f, x_f, e_f = shift(x_f, max_f)
            if WITH_MOMENTS:  # in the order of passes.MOMENTS
                ss = move(ss, sum_s, d_s, d_s, CAREFUL) + expectation(e_s, x_s, CAREFUL)
                pp = move(pp, sum_p, d_p, d_p, CAREFUL) + expectation(e_p, x_p, CAREFUL)
                ff = move(ff, sum_f, d_f, d_f, CAREFUL) + expectation(e_f, x_f, CAREFUL)
                ps = move(ps, sum_p, d_p, d_s, CAREFUL) + expectation(e_p, x_s, CAREFUL)
                fs = move(fs, sum_f, d_f, d_s, CAREFUL) + expectation(e_f, x_s, CAREFUL)
                fp = move(fp, sum_f, d_f, d_p, CAREFUL) + expectation(e_f, x_p, CAREFUL)
            sum_s = sum_s * exp(-d_s) + lane_sums(e_s)
            sum_p = sum_p * exp(-d_p) + lane_sums(e_p)
            sum_f = sum_f * exp(-d_f) + lane_sums(e_f)

    out = out_KT + row
    row_max_s, row_max_p, row_max_f = tl.max(max_s, 0), tl.max(max_p, 0), tl.max(max_f, 0)
    d_s, d_p, d_f = row_max_s - max_s, row_max_p - max_p, row_max_f - max_f
    tl.store(out, row_max_s)
    tl.store(out + 1 * num_tokens, row_max_p)
    tl.store(out + 2 * num_tokens, row_max_f)
    tl.store(out + 3 * num_tokens, tl.sum(sum_s * exp(-d_s), 0))
    tl.store(out + 4 * num_tokens, tl.sum(sum_p * exp(-d_p), 0))
    tl.store(out + 5 * num_tokens, tl.sum(sum_f * exp(-d_f), 0))
    if WITH_MOMENTS:
        tl.store(out + 6 * num_tokens, tl.sum(move(ss, sum_s, d_s, d_s, True), 0))
        tl.store(out + 7 * num_tokens, tl.sum(move(pp, sum_p, d_p, d_p, True), 0))
        tl.store(out + 8 * num_tokens, tl.sum(move(ff, sum_f, d_f, d_f, True), 0))
        tl.store(out + 9 * num_tokens, tl.sum(move(ps, sum_p, d_p, d_s, True), 0))
        tl.store(out + 10 * num_tokens, tl.sum(move(fs, sum_f, d_f, d_s, True), 0))
        tl.store(out + 11 * num_tokens, tl.sum(move(fp, sum_f, d_f, d_p, True), 0))


@triton.jit(do_not_specialize=SIZES)
def _student_statistics(out_KT, student, num_tokens, num_columns):
    """The part of `_view_statistics` that is about one view."""
    row = tl.program_id(0).to(tl.int64)
    block = block_columns()
    low, zero = tl.full((LANES,), LOWEST, tl.float32), tl.full((LANES,), 0.0, tl.float32)
    max_s, sum_s, moment = low, zero, zero
    begin, end = 0, num_columns // BLOCK * BLOCK
    for CAREFUL in tl.static_range(2):
        if CAREFUL:
            begin, end = end, num_columns
            if not are_finite(sum_s + moment):
                begin *= 0
                max_s, sum_s, moment = low, zero, zero
        for start in range(begin, end, BLOCK):
            x = load(student, row, start + block, num_columns, CAREFUL)
            max_s, growth, x, e = shift(x, max_s)
            moment = move(moment, sum_s, growth, growth, CAREFUL) + expectation(e, x, CAREFUL)
            sum_s = sum_s * exp(-growth) + lane_sums(e)

    out = out_KT + row
    row_max = tl.max(max_s, 0)
    growth = row_max - max_s
    tl.store(out, row_max)
    tl.store(out + 1 * num_tokens, tl.sum(sum_s * exp(-growth), 0))
    tl.store(out + 2 * num_tokens, tl.sum(move(moment, sum_s, growth, growth, True), 0))


@triton.jit(do_not_specialize=SIZES)
def _target_statistics(
    out_KT,
    views,
    num_tokens,
    num_columns,
    softmax,
    least_top_2T,
    scale,
    clip,
    RESIDUAL: tl.constexpr,
    WITH_TARGET_RATIO: tl.constexpr,
    WITH_STUDENT_RATIO: tl.constexpr,
    WITH_CLIPPED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = block_columns()
    norm_s, norm_p, norm_f = normalizers(softmax, row, num_tokens)
    if least_top_2T is not None:
        least_s = tl.load(least_top_2T + row)
        least_f = tl.load(least_top_2T + num_tokens + row)
    low, zero = tl.full((LANES,), LOWEST, tl.float32), tl.full((LANES,), 0.0, tl.float32)
    max_u, sum_u, target_ratio, student_ratio = low, zero, zero, zero
    clipped, num_both = zero, zero
    begin, end = 0, num_columns // BLOCK * BLOCK
    for CAREFUL in tl.static_range(2):
        if CAREFUL:
            begin, end = end, num_columns
            if not are_finite(sum_u + target_ratio + student_ratio + clipped):
                begin *= 0
                max_u, sum_u, target_ratio, student_ratio = low, zero, zero, zero
                clipped, num_both = zero, zero
        for start in range(begin, end, BLOCK):
            # The compiler removes the loads of views that are not used below.
            x_s, x_p, x_f = load_views(views, row, start + block, num_columns, CAREFUL)
            log_s, log_p = log_softmax(x_s, norm_s), log_softmax(x_p, norm_p)
            log_f = log_softmax(x_f, norm_f)
            log_u = log_target(log_p, log_f, scale, clip, RESIDUAL, CAREFUL)
            max_u, d_u, shifted, u = shift(log_u, max_u)
            if WITH_TARGET_RATIO:
                target_ratio = move(target_ratio, sum_u, d_u, d_u, CAREFUL)
                target_ratio += expectation(u, shifted - log_s, CAREFUL)
            sum_u = sum_u * exp(-d_u) + lane_sums(u)
            if WITH_STUDENT_RATIO:
                student_ratio += expectation(exp(log_s), log_s - log_u, CAREFUL)
            if WITH_CLIPPED:
                is_clipped = tl.abs(log_f - log_p) > clip
                clipped += expectation(exp(log_p), is_clipped.to(tl.float32), CAREFUL)
            if least_top_2T is not None:
                in_both = (x_s >= least_s) & (x_f >= least_f) & (start + block < num_columns)
                num_both += lane_sums(in_both.to(tl.float32))

    out = out_KT + row
    row_max_u = tl.max(max_u, 0)
    d_u = row_max_u - max_u
    tl.store(out, row_max_u)
    tl.store(out + 1 * num_tokens, tl.sum(sum_u * exp(-d_u), 0))
    if WITH_TARGET_RATIO:
        target_ratio = move(target_ratio, sum_u, d_u, d_u, True)
    tl.store(out + 2 * num_tokens, tl.sum(target_ratio, 0))
    tl.store(out + 3 * num_tokens, tl.sum(student_ratio, 0))
    tl.store(out + 4 * num_tokens, tl.sum(clipped, 0))
    tl.store(out + 5 * num_tokens, tl.sum(num_both, 0))


@triton.jit(do_not_specialize=SIZES)
def _mixture_statistics(
    out_KT,
    views,
    num_tokens,
    num_columns,
    softmax,
    scale,
    clip,
    log_student_share,
    log_target_share,
    RESIDUAL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = block_columns()
    norms = normalizers(softmax, row, num_tokens)
    norm_u = normalizer(softmax, TARGET, row, num_tokens)
    zero = tl.full((LANES,), 0.0, tl.float32)
    kl_target, kl_student = zero, zero
    begin, end = 0, num_columns // BLOCK * BLOCK
    for CAREFUL in tl.static_range(2):
        if CAREFUL:
            begin, end = end, num_columns
            if not are_finite(kl_target + kl_student):
                begin *= 0
                kl_target, kl_student = zero, zero
        for start in range(begin, end, BLOCK):
            logits = load_views(views, row, start + block, num_columns, CAREFUL)
            log_s, log_q = log_student_and_target(
                logits, norms, norm_u, scale, clip, RESIDUAL, CAREFUL
            )
            log_m = log_mixture(log_s, log_q, log_student_share, log_target_share)
            kl_target += expectation(exp(log_q), log_q - log_m, CAREFUL)
            kl_student += expectation(exp(log_s), log_s - log_m, CAREFUL)
    tl.store(out_KT + row, tl.sum(kl_target, 0))
    tl.store(out_KT + num_tokens + row, tl.sum(kl_student, 0))


@triton.jit(do_not_specialize=SIZES)
def _write_gradient(
    out,
    views,
    num_tokens,
    num_columns,
    softmax,
    kl_student_T,
    weights_T,
    scale,
    clip,
    log_student_share,
    log_target_share,
    student_share,
    RESIDUAL: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    """Write the gradient. One program per block, not per row."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    columns = start + block_columns()
    norms = normalizers(softmax, row, num_tokens)
    norm_u = normalizer(softmax, TARGET, row, num_tokens)
    # Full blocks load and store without a mask, since a mask would split both operations.
    if start + BLOCK <= num_columns:
        logits = load_views(views, row, columns, num_columns, False)
    else:
        logits = load_views(views, row, columns, num_columns, True)
    log_s, log_q = log_student_and_target(logits, norms, norm_u, scale, clip, RESIDUAL, True)
    if DIVERGENCE == "kl_target_student":
        gradient = exp(log_s) - exp(log_q)
    else:
        log_m = log_q
        if DIVERGENCE == "jsd":
            log_m = log_mixture(log_s, log_q, log_student_share, log_target_share)
        kl_student = tl.load(kl_student_T + row)
        gradient = student_share * product(exp(log_s), log_s - log_m - kl_student, True)
    gradient *= tl.load(weights_T + row).to(tl.float32)
    if start + BLOCK <= num_columns:
        tl.store(pointers(out, row, columns), gradient)
    else:
        tl.store(pointers(out, row, columns), gradient, mask=columns < num_columns)


@triton.jit(do_not_specialize=SIZES)
def _write_cross_entropy_gradient(
    out, student, num_tokens, num_columns, softmax, columns_T, weights_T
):
    """Write the gradient. One program per block, not per row."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    columns = start + block_columns()
    norm = normalizer(softmax, 0, row, num_tokens)
    target = tl.load(columns_T + row)
    weight = tl.load(weights_T + row).to(tl.float32)
    if start + BLOCK <= num_columns:
        s = exp(log_softmax(load(student, row, columns, num_columns, False), norm))
        gradient = weight * (s - (columns == target).to(tl.float32))
        tl.store(pointers(out, row, columns), gradient)
    else:
        s = exp(log_softmax(load(student, row, columns, num_columns, True), norm))
        gradient = weight * (s - (columns == target).to(tl.float32))
        tl.store(pointers(out, row, columns), gradient, mask=columns < num_columns)
