"""Loss, metrics and gradients of both forms equal dense fp64, on 1, 2 and 4 shards."""

from dataclasses import asdict, replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close

from aropd_mcore.numerics import vocab_parallel_anchored_residual_kl
from tests.numerics.problems import (
    EVERY_SETTING,
    ONE_VIEW,
    Problem,
    Settings,
    make_problem,
    oracle_answer,
)
from tests.numerics.runs import (
    counted_collectives,
    run_cross_entropy,
    run_fused,
    run_logits_form,
    run_one_view,
)
from tests.support import oracles
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.slow


def expected_collectives(run, problem: Problem, settings: Settings | None, kwargs: dict) -> list:
    """Return name and bytes of each collective, by the documented fp32 numbers per token."""
    num_tokens, hidden_size = problem.student_hidden.shape
    chunk_tokens = kwargs.get("chunk_tokens", 100)
    calls = []
    for start in range(0, num_tokens, chunk_tokens):
        size = 4 * min(chunk_tokens, num_tokens - start)
        if settings is None:
            calls.append(("all_gather", 4 * size))
        else:
            # 3 maxima, 3 sums; 6 moments; 2 x 16 top logits; 3 sampled logits
            num_numbers = 6 if run is run_one_view else 47
            calls += [("all_gather", num_numbers * size), ("all_gather", 6 * size)]
            if settings.divergence == "jsd":
                calls.append(("all_gather", 2 * size))
        if run is not run_logits_form:
            calls.append(("all_reduce", hidden_size * size))
    return calls


def check(run, problem: Problem, settings: Settings | None, group=None, **kwargs) -> float:
    """Check loss, metrics and gradients against fp64, collectives, and that no argument changed."""
    rank, size = (group.rank(), group.size()) if group else (0, 1)
    shard = problem.shard(rank, size)
    before = [tensor.detach().clone() for tensor in shard.tensors().values()]
    with counted_collectives() as forward_calls:
        loss, metrics = run(shard, settings, group, **kwargs)
    with counted_collectives() as backward_calls:
        loss.backward()

    assert backward_calls == []
    assert forward_calls == (expected_collectives(run, problem, settings, kwargs) if group else [])
    for tensor, copy in zip(shard.tensors().values(), before, strict=True):
        assert_close(tensor.detach(), copy, rtol=0, atol=0, equal_nan=True)
    grad_hidden, grad_weight = shard.student_hidden.grad, shard.student_weight.grad
    if run is run_logits_form and group:
        # The plain linear layer leaves each rank with its own part of the sum.
        dist.all_reduce(grad_hidden, group=group)

    expected = oracle_answer(problem, settings)
    close = {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False}
    assert loss.dtype == torch.float32
    assert_close(loss, expected.loss, **close)
    reported = {} if run is run_one_view else expected.metrics
    assert metrics.keys() == reported.keys() | {"loss_T"}
    for name, values in (reported | {"loss_T": expected.loss_T}).items():
        assert metrics[name].dtype == torch.float32 and not metrics[name].requires_grad
        assert_close(metrics[name], values, **close)
    # The gradient sums over the vocabulary. A single fp32 matrix product over Qwen2's 151,936 terms
    # had an error of 6e-5 (MKL on a processor with AVX-512).
    terms = {**close, "atol": 1e-4} if problem.vocab_size > 10_000 else close
    assert_close(grad_hidden, expected.grad_hidden, **terms)
    assert_close(grad_weight, expected.grad_weight.chunk(size)[rank], **close)
    return loss.item()


def check_everything(large_vocabulary: bool) -> list[float]:
    """Check all losses on every rank of the world, or in a single process without a group."""
    group = dist.group.WORLD if dist.is_initialized() else None
    problem = make_problem()  # of 4 shards, the third is partly padding and the last entirely
    masked = replace(problem, token_weights=torch.zeros_like(problem.token_weights))
    cases = [(run_logits_form, problem, settings, {}) for settings in EVERY_SETTING]
    cases += [(run_fused, problem, settings, {"chunk_tokens": 8}) for settings in EVERY_SETTING]
    cases += [(run_one_view, problem, settings, {"chunk_tokens": 8}) for settings in ONE_VIEW]
    cases += [
        (run_cross_entropy, problem, None, {"chunk_tokens": 8}),
        (run_fused, problem, Settings(), {"chunk_tokens": 100}),
        (run_fused, problem, Settings(), {}),
        (run_fused, make_problem(vocab_size=9), Settings(), {}),  # fewer than the top 16
        (run_fused, make_problem(teacher_hidden_size=5), Settings(), {"chunk_tokens": 4}),
    ]
    no_tokens = make_problem(num_tokens=0)
    for run, settings in ((run_logits_form, Settings()), (run_fused, Settings())):
        cases += [(run, no_tokens, settings, {}), (run, masked, settings, {})]
    cases.append((run_cross_entropy, no_tokens, None, {}))
    cases.append((run_one_view, no_tokens, ONE_VIEW[0], {}))
    if large_vocabulary:  # Qwen2's, padded
        large = make_problem(3, vocab_size=151_936, padded_vocab_size=152_064)
        cases.append((run_fused, large, Settings(), {"chunk_tokens": 2}))
    return [check(run, *case, group, **kwargs) for run, *case, kwargs in cases]


def check_ruled_out_shards(num_ruled_out: int) -> None:
    """Check shards with -inf in the first columns against the whole vocabulary."""
    group = dist.group.WORLD
    generator = torch.Generator().manual_seed(num_ruled_out)
    rows = torch.randn(3, 4, 64, generator=generator)
    rows[..., :num_ruled_out] = -torch.inf
    rows[0, 1, 40:] = -torch.inf  # more of the student's, which makes its KL infinite
    for divergence in ("kl_target_student", "kl_student_target", "jsd"):
        kwargs = {"vocab_size": 64, **asdict(Settings(divergence=divergence))}

        def loss_and_gradient(views: Tensor, tp_group, kwargs=kwargs):
            student = views[0].clone().requires_grad_()
            loss_T, metrics = vocab_parallel_anchored_residual_kl(
                student, *views[1:], tp_group=tp_group, **kwargs
            )
            return loss_T.detach(), metrics, *torch.autograd.grad(loss_T[2:].sum(), student)

        *numbers, grad = loss_and_gradient(rows.chunk(group.size(), -1)[group.rank()], group)
        *expected, expected_grad = loss_and_gradient(rows, None)
        assert_close(numbers, expected)
        assert_close(grad, expected_grad.chunk(group.size(), -1)[group.rank()])
        assert numbers[0][[0, 2, 3]].isfinite().all()
        assert numbers[0][1].isinf() == (divergence == "kl_target_student")


def check_four_ranks() -> list[float]:
    for num_ruled_out in (20, 33):
        check_ruled_out_shards(num_ruled_out)
    return check_everything(large_vocabulary=False)


def test_losses_of_the_whole_vocabulary_equal_the_oracle():
    check_everything(large_vocabulary=True)


def test_losses_of_two_shards_equal_the_oracle():
    first, second = run_ranks(check_everything, 2, True)
    assert first == second


def test_losses_of_four_shards_equal_the_oracle():
    first, *others = run_ranks(check_four_ranks, 4)
    assert all(losses == first for losses in others)


def test_loss_without_metrics_is_the_same():
    problem = make_problem().shard(0, 1)
    for run in (run_fused, run_logits_form):
        expected, every = run(problem, Settings())
        loss, metrics = run(problem, Settings(), with_metrics=False)
        assert torch.equal(loss, expected)
        assert metrics.keys() == {"loss_T", *(f"logprob_{d}" for d in oracles.DISTRIBUTIONS)}
        loss, metrics = run(problem, Settings(), with_topk=False)
        assert torch.equal(loss, expected)
        assert metrics.keys() == every.keys() - {"topk_overlap"}


def test_only_leaves_that_require_grad_get_gradients():
    problem = make_problem().shard(0, 1)
    with torch.no_grad():
        assert not run_fused(problem, Settings())[0].requires_grad
        assert not run_logits_form(problem, Settings())[0].requires_grad
    expected = oracle_answer(make_problem(), Settings())
    problem.student_hidden.requires_grad_(False)
    run_fused(problem, Settings())[0].backward()
    assert problem.student_hidden.grad is None
    assert_close(problem.student_weight.grad.double(), expected.grad_weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("run", [run_fused, run_logits_form, run_cross_entropy])
def test_gradients_of_two_runs_are_equal_bitwise(run):
    first, second = (make_problem().shard(0, 1) for _ in range(2))
    for problem in (first, second):
        run(problem, Settings())[0].backward()
    assert torch.equal(first.student_hidden.grad, second.student_hidden.grad)
    assert torch.equal(first.student_weight.grad, second.student_weight.grad)


@pytest.mark.parametrize("run", [run_fused, run_logits_form])
def test_second_derivative_is_refused(run):
    loss, _ = run(problem := make_problem().shard(0, 1), Settings())
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss, problem.student_hidden, create_graph=True)


@pytest.mark.parametrize("run", [run_fused, run_logits_form])
def test_backward_can_run_twice(run):
    """Tensors saved for backward outlive it, and are not written to."""
    loss, _ = run(problem := make_problem().shard(0, 1), Settings())
    leaves = (problem.student_hidden, problem.student_weight)
    first = torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    assert_close(first, torch.autograd.grad(3 * loss, leaves), rtol=0, atol=0)
    expected = oracle_answer(make_problem(), Settings()).grad_hidden
    assert_close(first[0].double() / 3, expected, rtol=1e-5, atol=1e-5)
