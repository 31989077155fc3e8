"""Building blocks of the kernels: loads of a block of a row's columns, and formulas on it.

    block [L, C]:  L lanes, C neighbouring columns that a lane loads at once

Shape letters: as in `kernels`.
"""

import math

import triton
import triton.language as tl

from aropd_mcore.numerics import passes

LANES = tl.constexpr(256)
"""Number of lanes L of a block: 8 warps."""

LANE_COLUMNS = tl.constexpr(4)
"""Number of columns C per lane. With 4, a lane takes at most 97 registers. With 8 it takes up to
175: a multiprocessor then holds one program, which idles while it waits for memory. Registers are
those that `python -m tests.numerics.compiled_kernels` prints."""

BLOCK = tl.constexpr(LANES.value * LANE_COLUMNS.value)
LOWEST = tl.constexpr(passes.LOWEST)
TARGET = tl.constexpr(passes.TARGET)
LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def block_columns():
    """Return 0, 1, 2, ... as [L, C]."""
    return tl.arange(0, LANES)[:, None] * LANE_COLUMNS + tl.arange(0, LANE_COLUMNS)[None, :]


@triton.jit
def pointers(matrix, row, columns):
    """Return 64-bit pointers: a transposed matrix has column strides as large as T."""
    return matrix.data + row * matrix.row_stride + columns.to(tl.int64) * matrix.column_stride


@triton.jit
def load(matrix, row, columns, num_columns, MASKED: tl.constexpr):
    """Load as fp32, with -inf past the last column, which adds 0 to careful sums."""
    at = pointers(matrix, row, columns)
    if MASKED:
        return tl.load(at, mask=columns < num_columns, other=float("-inf")).to(tl.float32)
    return tl.load(at).to(tl.float32)


@triton.jit
def load_views(views, row, columns, num_columns, MASKED: tl.constexpr):
    x_s = load(views.student, row, columns, num_columns, MASKED)
    x_p = load(views.partial, row, columns, num_columns, MASKED)
    return x_s, x_p, load(views.full, row, columns, num_columns, MASKED)


@triton.jit
def exp(x):
    """Compute exp by exp2; results below 2^-126 are 0.

    tl.exp uses the same product and approximation, and three more instructions for these results.
    """
    return tl.exp2(x * LOG2_E)


@triton.jit
def shift(x, max_L):
    """Return the lanes' new maxima, their growth, x - max and exp(x - max)."""
    new_L = tl.maximum(max_L, tl.max(x, 1))
    shifted = x - new_L[:, None]
    return new_L, new_L - max_L, shifted, exp(shifted)


@triton.jit
def move(moment_ab, sum_a, d_a, d_b, CAREFUL: tl.constexpr):
    """Return the moment after the maxima of a and b have grown by d_a and d_b."""
    return product(exp(-d_a), moment_ab - product(sum_a, d_b, CAREFUL), CAREFUL)


@triton.jit
def product(weight, value, CAREFUL: tl.constexpr):
    """Return weight * value. If CAREFUL, a weight of 0 times infinity counts 0."""
    product = weight * value
    if CAREFUL:
        product = tl.where(weight == 0.0, 0.0, product)
    return product


@triton.jit
def expectation(weight, value, CAREFUL: tl.constexpr):
    return lane_sums(product(weight, value, CAREFUL))


@triton.jit
def lane_sums(x):
    return tl.sum(x, 1)


@triton.jit
def are_finite(x_L):
    return tl.abs(tl.sum(x_L, 0)) < float("inf")


@triton.jit
def normalizer(softmax, k, row, num_tokens):
    """Load a row's maximum and the log of its sum."""
    at = k * num_tokens + row
    return tl.load(softmax.max_KT + at), tl.load(softmax.log_sum_KT + at)


@triton.jit
def normalizers(softmax, row, num_tokens):
    """Load the normalizers of student, partial and full."""
    norm_s = normalizer(softmax, 0, row, num_tokens)
    norm_p = normalizer(softmax, 1, row, num_tokens)
    return norm_s, norm_p, normalizer(softmax, 2, row, num_tokens)


@triton.jit
def log_softmax(x, norm):
    """Return x - max - log_sum. The maximum is subtracted first, as in `passes.Softmax`."""
    return (x - norm[0]) - norm[1]


@triton.jit
def log_target(log_p, log_f, scale, clip, RESIDUAL: tl.constexpr, CAREFUL: tl.constexpr):
    """Return log u = log p + lambda * clip(log f - log p, -c, +c), by case of RESIDUAL.

    NaN is propagated: the GPU's own clip would turn it into a number, and hide a view with NaN.
    """
    if RESIDUAL == "none":
        log_u = log_p
    elif RESIDUAL == "all":
        log_u = log_f
    else:
        residual = log_f - log_p
        if RESIDUAL == "clipped":
            residual = tl.clamp(residual, -clip, clip, propagate_nan=tl.PropagateNan.ALL)
        log_u = log_p + scale * residual
        if CAREFUL:  # where both views have -inf, the residual is -inf - (-inf)
            log_u = tl.where(log_p == float("-inf"), float("-inf"), log_u)
    return log_u


@triton.jit
def log_student_and_target(
    logits, norms, norm_u, scale, clip, RESIDUAL: tl.constexpr, CAREFUL: tl.constexpr
):
    log_p, log_f = log_softmax(logits[1], norms[1]), log_softmax(logits[2], norms[2])
    log_u = log_target(log_p, log_f, scale, clip, RESIDUAL, CAREFUL)
    return log_softmax(logits[0], norms[0]), log_softmax(log_u, norm_u)


@triton.jit
def log_mixture(log_s, log_q, log_student_share, log_target_share):
    """Return log m = log((1 - beta) s + beta q); -inf where both logs are -inf."""
    a, b = log_s + log_student_share, log_q + log_target_share
    larger = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    log_m = larger + tl.log(1.0 + exp(-tl.abs(a - b)))
    return tl.where(larger == float("-inf"), float("-inf"), log_m)
