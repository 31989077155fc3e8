"""Precision of every dtype and memory layout."""

import math
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from aropd_mcore.numerics import vocab_parallel_anchored_residual_kl
from tests.numerics.problems import Problem, Settings, make_problem, oracle_answer
from tests.numerics.runs import run_cross_entropy, run_fused, run_logits_form
from tests.support import oracles

pytestmark = pytest.mark.slow

DIVERGENCES = ("kl_target_student", "kl_student_target", "jsd")
GPU = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ],
)


def rms(error: Tensor) -> float:
    return error.double().square().mean().sqrt().item()


def draw_problem(dtype: torch.dtype, device: str, seed: int) -> Problem:
    problem = make_problem(16, vocab_size=32_700, padded_vocab_size=32_768, seed=seed)
    if dtype == torch.float16:  # fp16 is trained with a scaled loss
        problem = replace(problem, token_weights=2**10 * problem.token_weights)
    return problem.on(device).to(dtype)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradient_error_is_at_most_that_of_eager_in_the_same_dtype(divergence, dtype, device):
    """The gradient's error to fp64 is at most that of the dense formula by autograd in one dtype.

    With respect to logits this holds for each of three draws. Through the output layer the error is
    at most a quarter over all draws together, since logits are not rounded. The ratio depends on
    how a CPU computes products in half precision; the largest one found is 0.201. It is checked in
    half precision only, since in fp32 the error of the matrix products dominates.

    In fp32 on a GPU a larger error is allowed: 1.03 to 2.0 times as large on an H200. There exp(x)
    is 2^(x log2 e), whose product is rounded as coarsely as log s itself.
    """
    slack = 3.0 if (device, dtype) == ("cuda", torch.float32) else 1.0
    settings = Settings(divergence=divergence)
    kwargs = {"scale": settings.residual_scale, "clip": settings.residual_clip}
    kwargs |= {"divergence": divergence, "jsd_weight": settings.jsd_weight}
    ours_squared = eager_squared = 0.0
    for seed in range(3):
        problem = draw_problem(dtype, device, seed)
        weights, vocab_size = problem.token_weights, problem.vocab_size
        logits = [x.detach()[:, :vocab_size] for x in problem.shard(0, 1).logits()]

        def gradient(compute_losses, to: torch.dtype, logits=logits, weights=weights) -> Tensor:
            student, partial, full = (x.to(to, copy=True) for x in logits)
            student.requires_grad_()
            loss = (weights.to(to) * compute_losses(student, partial, full)).sum()
            return torch.autograd.grad(loss, student)[0]

        def dense(*views: Tensor) -> Tensor:
            return oracles.token_losses(*views, **kwargs)

        def ours(*views: Tensor, vocab_size=vocab_size) -> Tensor:
            return vocab_parallel_anchored_residual_kl(
                *views, vocab_size=vocab_size, **asdict(settings)
            )[0].to(dtype)

        truth, eager = gradient(dense, torch.float64), gradient(dense, dtype)
        eager_fails = bool(eager.isnan().any())
        assert not eager_fails or (divergence, dtype) == ("jsd", torch.float16)  # log 0
        error = rms(gradient(ours, dtype) - truth)
        assert error <= slack * rms(eager - truth) or (eager_fails and math.isfinite(error))

        shard = problem.shard(0, 1)
        run_fused(shard, settings)[0].backward()
        assert shard.student_hidden.grad.dtype == shard.student_weight.grad.dtype == dtype
        truth, eager = (oracle_answer(problem, settings, to) for to in (torch.float64, dtype))
        for name in ("hidden", "weight"):
            true_grad = getattr(truth, f"grad_{name}")
            ours_squared += rms(getattr(shard, f"student_{name}").grad - true_grad) ** 2
            eager_squared += rms(getattr(eager, f"grad_{name}") - true_grad) ** 2
    if dtype != torch.float32 and not eager_fails:
        assert ours_squared <= 0.25**2 * eager_squared
    assert math.isfinite(ours_squared)


@pytest.mark.usefixtures("either_passes")
@pytest.mark.parametrize("run", [run_fused, run_cross_entropy])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loss_of_close_views_in_half_precision_keeps_fp32_logits(dtype, run):
    """With logits of 24 rounded to bf16, loss and gradient would be off by 40 and 80 percent."""
    problem = make_problem(16, hidden_size=64, vocab_size=2000, padded_vocab_size=2048)
    weight = problem.student_weight / problem.logits()[0][:, : problem.vocab_size].max() * 24
    noise = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(1))
    partial, full = problem.student_hidden + 0.01 * noise.cumsum(0)
    close = replace(
        problem,
        student_weight=weight,
        teacher_weight=weight,
        partial_hidden=partial,
        full_hidden=full,
    ).to(dtype)
    settings = Settings() if run is run_fused else None
    truth, shard = oracle_answer(close, settings), close.shard(0, 1)
    loss, metrics = run(shard, settings, chunk_tokens=6)
    loss.backward()
    for name, values in metrics.items():
        expected = truth.metrics.get(name, truth.loss_T)
        assert_close(values, expected, rtol=1e-3, atol=1e-5, check_dtype=False)
    bound = 0.01 if dtype == torch.bfloat16 else 0.002  # Triton's interpreter truncates bf16
    for actual, expected in (
        (shard.student_hidden.grad, truth.grad_hidden),
        (shard.student_weight.grad, truth.grad_weight),
    ):
        assert actual is not None and rms(actual - expected) < bound * rms(expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradient_of_half_logits_is_the_fp32_gradient_rounded_once(divergence, dtype):
    problem = make_problem(vocab_size=64)
    logits = [x.detach().to(dtype) for x in problem.shard(0, 1).logits()]

    def gradient(dtype: torch.dtype) -> Tensor:
        student, partial, full = (x.to(dtype, copy=True) for x in logits)
        student.requires_grad_()
        loss_T, _ = vocab_parallel_anchored_residual_kl(
            student, partial, full, vocab_size=64, **asdict(Settings(divergence=divergence))
        )
        assert loss_T.dtype == torch.float32
        (problem.token_weights * loss_T).sum().backward()
        assert student.grad is not None
        return student.grad

    assert torch.equal(gradient(dtype), gradient(torch.float32).to(dtype))


@pytest.mark.parametrize("run", [run_fused, run_logits_form, run_cross_entropy])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_loss_in_fp64_passes_gradcheck(run, divergence):
    problem = make_problem(num_tokens=5, hidden_size=3, vocab_size=11, padded_vocab_size=12)
    problem = problem.to(torch.float64).shard(0, 1)
    weights = problem.token_weights.double()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        changed = replace(
            problem, student_hidden=hidden, student_weight=weight, token_weights=weights
        )
        return run(changed, Settings(divergence=divergence))[0]

    leaves = (problem.student_hidden, problem.student_weight)
    assert loss(*leaves).dtype == torch.float64
    assert torch.autograd.gradcheck(loss, leaves)


def test_loss_in_fp64_equals_the_oracle():
    problem = make_problem(num_tokens=32, vocab_size=500, padded_vocab_size=512)
    problem = problem.to(torch.float64)
    problem = replace(problem, token_weights=problem.token_weights.double())
    truth = oracle_answer(problem, Settings())
    for run in (run_fused, run_logits_form):
        shard = problem.shard(0, 1)
        loss, metrics = run(shard, Settings())
        loss.backward()
        exact = {"rtol": 1e-11, "atol": 1e-13}
        expected = truth.metrics | {"loss_T": truth.loss_T}
        assert metrics["loss_T"].dtype == torch.float64
        for name, values in metrics.items():
            assert_close(values, expected[name], check_dtype=False, **exact)
        assert_close(shard.student_hidden.grad, truth.grad_hidden, **exact)


@pytest.mark.usefixtures("either_passes")
def test_gradient_in_fp16_with_small_weights_does_not_underflow():
    """A large batch has weights of 1e-6. Their products with s - q are too small for fp16."""
    problem = make_problem(num_tokens=32, vocab_size=500, padded_vocab_size=512)
    problem = replace(problem, token_weights=1e-6 * problem.token_weights).to(torch.float16)
    truth = oracle_answer(problem, Settings())
    main_grad = torch.zeros(problem.student_weight.shape)
    run_fused(problem.shard(0, 1), Settings(), main_grad_VH=main_grad)[0].backward()
    assert rms(main_grad - truth.grad_weight) < 2e-3 * rms(truth.grad_weight)


def with_other_strides(problem: Problem) -> Problem:
    """Return the same numbers with every matrix transposed in memory."""
    transposed = {
        name: x.detach().T.contiguous().T for name, x in problem.tensors().items() if x.dim() == 2
    }
    ids = problem.sampled_ids.repeat_interleave(2)[::2]
    weights = problem.token_weights.repeat_interleave(2)[::2]
    return replace(problem, sampled_ids=ids, token_weights=weights, **transposed)


@pytest.mark.usefixtures("either_passes")
@pytest.mark.parametrize("run", [run_fused, run_cross_entropy])
def test_loss_of_hidden_states_with_other_strides_is_the_same(run):
    expected, strided = make_problem().shard(0, 1), with_other_strides(make_problem())
    strided.student_hidden.requires_grad_()
    strided.student_weight.requires_grad_()
    assert not strided.student_hidden.is_contiguous()
    for problem in (expected, strided):
        run(problem, Settings(), chunk_tokens=5)[0].backward()
    assert_close(strided.student_hidden.grad, expected.student_hidden.grad)
    assert_close(strided.student_weight.grad, expected.student_weight.grad)


@pytest.mark.rest
@pytest.mark.usefixtures("either_passes")
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_loss_of_logits_with_other_strides_is_the_same(divergence):
    wide = torch.randn(3, 20, 64, generator=torch.Generator().manual_seed(3))
    kwargs = {"vocab_size": 30, **asdict(Settings(divergence=divergence))}
    every_second = wide[..., ::2].detach()  # 32 columns, 2 of them padding
    transposed = every_second.transpose(1, 2).contiguous().transpose(1, 2)
    gradients = []
    for views in (every_second.contiguous(), every_second, transposed):
        student = views[0].detach().requires_grad_()
        loss_T, _ = vocab_parallel_anchored_residual_kl(student, *views[1:], **kwargs)
        gradients += torch.autograd.grad(loss_T.sum(), student)
    assert (gradients[0][:, 30:] == 0).all()
    for gradient in gradients[1:]:
        assert_close(gradient, gradients[0])


@pytest.mark.usefixtures("either_passes")
@pytest.mark.parametrize("rows", ["equal", "one-hot"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_loss_of_equal_and_one_hot_rows_equals_the_oracle(rows, divergence):
    if rows == "equal":
        views = torch.full((3, 4, 50), 7.25)
    else:
        views = torch.zeros(3, 4, 50)
        views[:, torch.arange(4), torch.tensor([0, 7, 49, 13])] = 90.0
        views[2, 3, 13], views[2, 3, 14] = 0.0, 90.0  # here the full view disagrees
    student = views[0].clone().requires_grad_()
    settings = Settings(divergence=divergence)
    loss_T, _ = vocab_parallel_anchored_residual_kl(
        student, *views[1:], vocab_size=50, **asdict(settings)
    )
    wide = views[0].double().requires_grad_()
    expected_T = oracles.token_losses(
        wide, *views[1:].double(), scale=0.8, clip=5.0, divergence=divergence, jsd_weight=0.3
    )
    assert_close(loss_T, expected_T, check_dtype=False, rtol=1e-5, atol=1e-5)
    gradient, expected = (
        torch.autograd.grad(losses.sum(), leaf)[0]
        for losses, leaf in ((loss_T, student), (expected_T, wide))
    )
    assert_close(gradient, expected, check_dtype=False, rtol=1e-5, atol=1e-5)
