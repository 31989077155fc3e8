"""Properties of the loss for all inputs, and at the limits of floating point."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from aropd_mcore.numerics import anchored_residual_logprobs, vocab_parallel_anchored_residual_kl
from aropd_mcore.numerics.kl import add_up_target, add_up_views
from aropd_mcore.numerics.loss_settings import LossSettings
from aropd_mcore.numerics.passes import MOMENTS, TorchPasses, ViewLogits
from tests.support import oracles

INF = torch.inf
DIVERGENCES = ("kl_target_student", "kl_student_target", "jsd")
few_examples = settings(max_examples=settings.default.max_examples // 2)
scales = st.sampled_from((0.0, 0.4, 0.8, 1.0, 1.4))
clips = st.sampled_from((0.5, 5.0, 100.0, None))


def kl(
    student: Tensor, partial: Tensor, full: Tensor, *, scale=0.8, clip: float | None = 5.0, **kw
):
    return vocab_parallel_anchored_residual_kl(
        student,
        partial,
        full,
        residual_scale=scale,
        residual_clip=clip,
        vocab_size=student.size(1),
        **kw,
    )


@st.composite
def three_rows(draw) -> tuple[Tensor, Tensor, Tensor]:
    """Draw logits that are flat, usual or nearly one-hot."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 40)))
    spread = draw(st.sampled_from((0.01, 1.0, 10.0, 50.0)))
    student, partial, full = spread * torch.randn(3, *shape, generator=generator)
    return student, partial, full


def log_softmax64(logits: Tensor) -> Tensor:
    return logits.double().log_softmax(-1)


@few_examples
@given(three_rows(), scales, clips)
def test_loss_of_special_settings_equals_simpler_losses(rows, scale, clip):
    student, partial, full = rows
    log_s, log_p, log_f = (log_softmax64(row) for row in rows)
    close = {"rtol": 1e-4, "atol": 1e-5, "check_dtype": False}
    assert_close(
        kl(student, partial, full, scale=0, clip=clip)[0], oracles.kl(log_p, log_s), **close
    )
    assert_close(
        kl(student, partial, full, scale=1, clip=None)[0], oracles.kl(log_f, log_s), **close
    )
    for divergence in DIVERGENCES:
        equal_views, _ = kl(
            student, partial, partial, scale=scale, clip=clip, divergence=divergence
        )
        anchor_only, _ = kl(student, partial, full, scale=0, clip=None, divergence=divergence)
        assert_close(equal_views, anchor_only, **close)
        itself, _ = kl(student, student, student, scale=scale, clip=clip, divergence=divergence)
        assert_close(itself, torch.zeros_like(itself), **close)


@few_examples
@given(three_rows(), scales, clips, st.sampled_from(DIVERGENCES))
def test_loss_is_not_negative_and_ignores_shifts(rows, scale, clip, divergence):
    kwargs = {"scale": scale, "clip": clip, "divergence": divergence}
    loss_T, metrics = kl(*rows, **kwargs)
    assert (loss_T >= -1e-5).all()
    for name, values in metrics.items():
        assert (values >= -1e-5).all(), name
    # Shifts that fp32 adds exactly to logits rounded to 2^-10.
    rounded = [(row * 1024).round() / 1024 for row in rows]
    shifted = [row + shift for row, shift in zip(rounded, (512.0, -1024.0, 64.0), strict=True)]
    assert torch.equal(kl(*rounded, **kwargs)[0], kl(*shifted, **kwargs)[0])


@few_examples
@given(three_rows(), scales, clips)
def test_dense_target_equals_the_oracle(rows, scale, clip):
    _, log_p, log_f = (log_softmax64(row) for row in rows)
    target = anchored_residual_logprobs(log_p, log_f, residual_scale=scale, residual_clip=clip)
    assert target.dtype == torch.float64
    assert_close(target, oracles.target_logprobs(log_p, log_f, scale, clip), rtol=1e-9, atol=1e-9)
    in_fp32 = anchored_residual_logprobs(
        log_p.float()[None], log_f.float()[None], residual_scale=scale, residual_clip=clip
    )
    assert in_fp32.shape == (1, *target.shape)
    assert_close(in_fp32[0].exp(), target.exp().float(), rtol=1e-3, atol=1e-5)


@few_examples
@given(three_rows(), scales, clips, st.lists(st.integers(0, 40), max_size=4))
def test_statistics_of_any_shards_add_up(rows, scale, clip, cuts):
    """The ranks' numbers add up for shards of any sizes, including empty ones."""
    objective = LossSettings(scale, clip, "kl_student_target", 0.5)
    num_columns = rows[0].size(1)
    bounds = [0, *sorted(min(cut, num_columns) for cut in cuts), num_columns]
    results = []
    for edges in ([0, num_columns], bounds):
        shards = [
            ViewLogits(*(row[:, start:end] for row in rows))
            for start, end in itertools.pairwise(edges)
        ]
        runs = [TorchPasses(shard.student) for shard in shards]
        pairs = list(zip(runs, shards, strict=True))
        view_numbers = torch.stack([run.view_statistics(shard, MOMENTS) for run, shard in pairs])
        softmax, log_means = add_up_views(view_numbers, MOMENTS)
        least_top_2T = torch.stack([rows[0].median(-1).values, rows[2].median(-1).values])
        kwargs = {"with_metrics": True, "least_top_2T": least_top_2T}
        target_numbers = torch.stack(
            [run.target_statistics(shard, softmax, objective, **kwargs) for run, shard in pairs]
        )
        softmax, sums = add_up_target(softmax, target_numbers)
        results.append((*softmax, log_means, *sums))
    assert_close(*results, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("clip", [5.0, None])
@pytest.mark.parametrize("scale", [0, 0.8, 1, 1.4])
def test_target_of_tokens_with_minus_infinity_keeps_the_allowed_ones(scale, clip):
    third = torch.tensor(1 / 3).log()
    log_p = torch.tensor([-INF, -INF, third, third, third])
    log_f = torch.tensor([-INF, third, -INF, third, third])
    target = anchored_residual_logprobs(
        log_p, log_f, residual_scale=scale, residual_clip=clip
    ).exp()
    if scale == 0:
        expected = log_p.exp()
    elif clip is None:
        allowed = (log_p > -INF) | (scale == 1)
        expected = torch.where(allowed & (log_f > -INF), 1.0, 0.0)
        expected /= expected.sum()
    else:
        expected = torch.tensor([0, 0, torch.exp(torch.tensor(-scale * clip)), 1, 1])
        expected /= expected.sum()
    assert_close(target, expected)


@pytest.mark.slow
@pytest.mark.usefixtures("either_passes")
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("scale, clip", [(0.8, 5.0), (1.4, None)])
def test_token_with_minus_infinity_in_all_views_is_ignored(divergence, scale, clip):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(3, 4, 20, generator=generator)
    with_hole = rows.clone()
    with_hole[..., 7] = -INF
    without = torch.cat([rows[..., :7], rows[..., 8:]], -1)
    results = []
    for student, partial, full in (with_hole, without):
        student = student.clone().requires_grad_()
        loss_T, metrics = kl(student, partial, full, scale=scale, clip=clip, divergence=divergence)
        (gradient,) = torch.autograd.grad(loss_T.sum(), student)
        results.append((loss_T, metrics, gradient))
    (loss_T, metrics, gradient), (expected_loss, expected_metrics, expected_gradient) = results
    assert_close(loss_T, expected_loss)
    assert_close(metrics, expected_metrics)
    assert (gradient[:, 7] == 0).all()
    assert_close(torch.cat([gradient[:, :7], gradient[:, 8:]], -1), expected_gradient)


@pytest.mark.usefixtures("either_passes")
def test_topk_overlap_with_ties_for_the_last_place_counts_them():
    flat = torch.zeros(1, 40)
    _, metrics = kl(flat, flat, flat)
    assert metrics["topk_overlap"].item() == 1
    above = torch.arange(40.0)[None]  # the full view's top is columns 24 to 39
    student = (above >= 32).float()  # the student's top is 32 to 39, and all others tie
    _, metrics = kl(student, flat, above)
    assert metrics["topk_overlap"].item() == 1


@pytest.mark.usefixtures("either_passes")
def test_loss_of_different_supports_is_infinite_except_for_jsd():
    student = torch.tensor([[0.0, 0.0, -INF]])
    teacher = torch.tensor([[-INF, 0.0, 0.0]])
    for divergence in ("kl_target_student", "kl_student_target"):
        loss_T, _ = kl(student, teacher, teacher, divergence=divergence)
        assert loss_T.item() == INF
    student.requires_grad_()
    loss_T, metrics = kl(student, teacher, teacher)
    loss_T.backward()
    assert_close(student.grad, torch.tensor([[0.5, 0.0, -0.5]]))
    assert_close(metrics["entropy_student"], torch.tensor([2.0]).log())
    loss_T, _ = kl(student, teacher, teacher, divergence="jsd")
    assert_close(loss_T.detach(), torch.tensor([2.0]).log() / 2)


@pytest.mark.slow
@pytest.mark.usefixtures("either_passes")
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("clip", [5.0, 200.0, None])
def test_loss_of_extreme_logits_equals_the_oracle(divergence, clip):
    generator = torch.Generator().manual_seed(2)
    rows = (2e4 * torch.rand(3, 6, 30, generator=generator) - 1e4).round()
    rows[:, 0, 1:] = -1e4  # one column has all the mass, in every view
    rows[:, 0, 0] = 1e4
    student, partial, full = rows
    student.requires_grad_()
    wide = student.detach().double().requires_grad_()
    kwargs = {"scale": 0.8, "clip": clip, "divergence": divergence}
    loss_T, _ = kl(student, partial, full, **kwargs)
    # The oracle's log of the mixture needs probabilities above 0. The package works in log space.
    expected_T = oracles.token_losses(wide, partial.double(), full.double(), **kwargs)
    finite_T = expected_T.isfinite()
    assert loss_T.isfinite().all() and (finite_T.all() or divergence == "jsd")
    assert_close(loss_T[finite_T], expected_T[finite_T], check_dtype=False, rtol=1e-5, atol=1e-4)
    (gradient,) = torch.autograd.grad(loss_T.sum(), student)
    assert gradient.isfinite().all()
    if divergence != "jsd":
        (expected,) = torch.autograd.grad(expected_T.sum(), wide)
        assert_close(gradient, expected, check_dtype=False, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("either_passes")
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("row", [0, 1, 2])
@pytest.mark.parametrize("bad", [torch.nan, INF])
def test_nan_or_infinity_in_a_row_gives_nan_in_this_row_only(divergence, row, bad):
    rows = torch.randn(3, 2, 20)
    rows[row, 1, 5] = bad
    student = rows[0].clone().requires_grad_()
    loss_T, _ = kl(student, rows[1], rows[2], divergence=divergence)
    assert loss_T[0].isfinite() and loss_T[1].isnan()
    (gradient,) = torch.autograd.grad(loss_T.sum(), student)
    assert gradient[0].isfinite().all() and gradient[1].isnan().all()
