"""Loss, metrics and gradients of both forms against dense fp64, on 1, 2 and 4 shards."""

from contextlib import contextmanager
from dataclasses import asdict, replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aropd_mcore.numerics import (
    fused_linear_anchored_residual_kl,
    fused_linear_cross_entropy,
    vocab_parallel_anchored_residual_kl,
)
from tests.numerics.problems import (
    EVERY_SETTING,
    Problem,
    Settings,
    make_problem,
    oracle_answer,
)
from tests.ranks import run_ranks

COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor")
COLLECTIVES += ("broadcast", "reduce", "barrier", "all_to_all_single", "all_gather_object")


@contextmanager
def counted_collectives():
    """The names of the collectives that run within."""
    calls: list[str] = []

    def counting(name: str):
        run = getattr(dist, name)
        return lambda *args, **kwargs: (calls.append(name), run(*args, **kwargs))[1]

    with mock.patch.multiple(dist, **{name: counting(name) for name in COLLECTIVES}):
        yield calls


def run_fused(problem: Problem, settings: Settings, tp_group=None, **kwargs):
    return fused_linear_anchored_residual_kl(
        problem.student_hidden,
        problem.student_weight,
        problem.partial_hidden,
        problem.full_hidden,
        problem.teacher_weight,
        problem.token_weights,
        vocab_size=problem.vocab_size,
        sampled_ids_T=problem.sampled_ids,
        tp_group=tp_group,
        **asdict(settings),
        **kwargs,
    )


def run_logits_form(problem: Problem, settings: Settings, tp_group=None, **kwargs):
    """The logits form with an output layer of plain autograd around it: (loss, metrics)."""
    loss_T, metrics = vocab_parallel_anchored_residual_kl(
        *problem.logits(),
        vocab_size=problem.vocab_size,
        sampled_ids_T=problem.sampled_ids,
        tp_group=tp_group,
        **asdict(settings),
        **kwargs,
    )
    assert loss_T.dtype == torch.float32
    return (problem.token_weights * loss_T).sum(), metrics | {"loss_T": loss_T.detach()}


def run_cross_entropy(problem: Problem, _: None, tp_group=None, **kwargs):
    return fused_linear_cross_entropy(
        problem.student_hidden,
        problem.student_weight,
        problem.sampled_ids,
        problem.token_weights,
        vocab_size=problem.vocab_size,
        tp_group=tp_group,
        **kwargs,
    )


def check(run, problem: Problem, settings: Settings | None, group=None, **kwargs) -> float:
    """Loss, metrics and gradients against fp64; the collectives; and that no argument changed."""
    rank, size = (group.rank(), group.size()) if group else (0, 1)
    shard = problem.shard(rank, size)
    before = [tensor.detach().clone() for tensor in shard.tensors().values()]
    with counted_collectives() as forward_calls:
        loss, metrics = run(shard, settings, group, **kwargs)
    with counted_collectives() as backward_calls:
        loss.backward()

    assert backward_calls == []
    for tensor, copy in zip(shard.tensors().values(), before, strict=True):
        assert_close(tensor.detach(), copy, rtol=0, atol=0, equal_nan=True)
    grad_hidden, grad_weight = shard.student_hidden.grad, shard.student_weight.grad
    if run is run_logits_form:
        assert len(forward_calls) == (3 if group and len(shard.token_weights) else 0)
        if group:  # around it is a plain linear layer, which leaves each rank with its own share
            dist.all_reduce(grad_hidden, group=group)

    expected = oracle_answer(problem, settings)
    close = {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False}
    assert loss.dtype == torch.float32
    assert_close(loss, expected.loss, **close)
    assert metrics.keys() == expected.metrics.keys() | {"loss_T"}
    for name, values in (expected.metrics | {"loss_T": expected.loss_T}).items():
        assert metrics[name].dtype == torch.float32 and not metrics[name].requires_grad
        assert_close(metrics[name], values, **close)
    # It sums over the vocabulary: an fp32 matrix product over Qwen2's 151,936 terms was seen to be
    # off by 6e-5 in itself (MKL on a processor with AVX-512).
    terms = {**close, "atol": 1e-4} if problem.vocab_size > 10_000 else close
    assert_close(grad_hidden, expected.grad_hidden, **terms)
    assert_close(grad_weight, expected.grad_weight.chunk(size)[rank], **close)
    return loss.item()


def check_everything(large_vocabulary: bool) -> list[float]:
    """The losses, on every rank of the world, or without a group in a process alone."""
    group = dist.group.WORLD if dist.is_initialized() else None
    problem = make_problem()  # of 4 shards, the third is partly padding and the last wholly
    cases = [(run_logits_form, problem, settings, {}) for settings in EVERY_SETTING]
    cases += [(run_fused, problem, settings, {"chunk_tokens": 8}) for settings in EVERY_SETTING]
    cases += [
        (run_cross_entropy, problem, None, {"chunk_tokens": 8}),
        (run_fused, problem, Settings(), {"chunk_tokens": 100}),
        (run_fused, make_problem(vocab_size=9), Settings(), {}),  # fewer than the top 16
    ]
    no_tokens = make_problem(num_tokens=0)
    cases += [(run, no_tokens, Settings(), {}) for run in (run_logits_form, run_fused)]
    cases.append((run_cross_entropy, no_tokens, None, {}))
    if large_vocabulary:  # Qwen2's, padded
        large = make_problem(3, vocab_size=151_936, padded_vocab_size=152_064)
        cases.append((run_fused, large, Settings(), {"chunk_tokens": 2}))
    return [check(run, *case, group, **kwargs) for run, *case, kwargs in cases]


def check_a_ruled_out_shard() -> None:
    """-inf in every column of the first of 4 shards: the numbers of the whole vocabulary."""
    group = dist.group.WORLD
    rows = torch.randn(3, 4, 64)
    rows[..., :20] = -torch.inf
    kwargs = {"vocab_size": 64, **asdict(Settings())}
    shards = rows.chunk(group.size(), -1)[group.rank()]
    loss_T, metrics = vocab_parallel_anchored_residual_kl(*shards, tp_group=group, **kwargs)
    expected_T, expected_metrics = vocab_parallel_anchored_residual_kl(*rows, **kwargs)
    assert_close((loss_T, metrics), (expected_T, expected_metrics))
    assert loss_T.isfinite().all()


def test_a_ruled_out_shard():
    run_ranks(check_a_ruled_out_shard, 4)


def test_whole_vocabulary():
    check_everything(large_vocabulary=True)


@pytest.mark.parametrize("tp_size", [2, 4])
def test_sharded_vocabulary(tp_size):
    first, *others = run_ranks(check_everything, tp_size, tp_size == 2)
    assert all(losses == first for losses in others)


@pytest.mark.parametrize("divergence", ["kl_target_student", "kl_student_target", "jsd"])
def test_bf16_errs_no_more_than_eager_bf16(divergence):
    problem = make_problem(num_tokens=64, vocab_size=300, padded_vocab_size=320)
    problem = problem.to(torch.bfloat16)
    settings = Settings(divergence=divergence)
    truth = oracle_answer(problem, settings)
    eager = oracle_answer(problem, settings, torch.bfloat16)

    def error(values: Tensor, true_values: Tensor) -> float:
        return (values.double() - true_values).square().mean().sqrt().item()

    for run in (run_logits_form, run_fused):
        shard = problem.shard(0, 1)
        loss, metrics = run(shard, settings)
        loss.backward()
        ours = {
            "loss_T": metrics["loss_T"],
            "grad_hidden": shard.student_hidden.grad,
            "grad_weight": shard.student_weight.grad,
        }
        for name, values in ours.items():
            true_values, eager_values = getattr(truth, name), getattr(eager, name)
            assert error(values, true_values) <= error(eager_values, true_values), (run, name)
        assert shard.student_hidden.grad.dtype == shard.student_weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("divergence", ["kl_target_student", "kl_student_target", "jsd"])
def test_bf16_logits_get_the_fp32_gradient_rounded_once(divergence):
    problem = make_problem(vocab_size=64)
    logits = [x.detach().bfloat16() for x in problem.shard(0, 1).logits()]

    def gradient(dtype: torch.dtype) -> Tensor:
        student, partial, full = (x.to(dtype, copy=True) for x in logits)
        student.requires_grad_()
        loss_T, _ = vocab_parallel_anchored_residual_kl(
            student, partial, full, vocab_size=64, **asdict(Settings(divergence=divergence))
        )
        (problem.token_weights * loss_T).sum().backward()
        assert student.grad is not None
        return student.grad

    assert torch.equal(gradient(torch.bfloat16), gradient(torch.float32).bfloat16())


def test_no_tensor_of_tokens_times_vocabulary():
    """Every tensor made in forward or backward is at most a chunk's logits or the weight."""
    problem = make_problem(num_tokens=64, vocab_size=500, padded_vocab_size=512).shard(0, 1)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            sizes = [leaf.numel() for leaf in tree_leaves(out) if torch.is_tensor(leaf)]
            largest = max([largest, *sizes])
            return out

    with Watch():
        loss, _ = run_fused(problem, Settings(), chunk_tokens=4)
        loss.backward()
    assert largest == 512 * 8


def test_live_teacher_is_the_students_own_weight():
    apart = make_problem().shard(0, 1)
    apart = replace(apart, teacher_weight=apart.student_weight.detach().clone())
    shared = replace(make_problem().shard(0, 1), teacher_weight=apart.student_weight)
    shared = replace(shared, student_weight=apart.student_weight)
    run_fused(apart, Settings())[0].backward()
    grad, apart.student_weight.grad = apart.student_weight.grad, None
    run_fused(shared, Settings())[0].backward()
    assert grad is not None and torch.equal(grad, shared.student_weight.grad)


def test_gradients_only_where_asked():
    problem = make_problem().shard(0, 1)
    with torch.no_grad():
        assert not run_fused(problem, Settings())[0].requires_grad
        assert not run_logits_form(problem, Settings())[0].requires_grad
    expected = oracle_answer(make_problem(), Settings())
    problem.student_hidden.requires_grad_(False)
    run_fused(problem, Settings())[0].backward()
    assert problem.student_hidden.grad is None
    assert_close(problem.student_weight.grad.double(), expected.grad_weight, rtol=1e-5, atol=1e-5)


def test_without_metrics_the_loss_is_the_same():
    problem = make_problem().shard(0, 1)
    for run in (run_fused, run_logits_form):
        loss, metrics = run(problem, Settings(), with_metrics=False)
        expected, _ = run(problem, Settings())
        assert torch.equal(loss, expected)
        assert metrics.keys() == {"loss_T", "logprob_student", "logprob_partial", "logprob_full"}


def test_same_bits_twice():
    first, second = (make_problem().shard(0, 1) for _ in range(2))
    for problem in (first, second):
        run_fused(problem, Settings(), chunk_tokens=5)[0].backward()
    assert torch.equal(first.student_hidden.grad, second.student_hidden.grad)
    assert torch.equal(first.student_weight.grad, second.student_weight.grad)


@pytest.mark.parametrize("run", [run_fused, run_logits_form])
def test_a_second_derivative_is_refused(run):
    loss, _ = run(problem := make_problem().shard(0, 1), Settings())
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss, problem.student_hidden, create_graph=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_in_bf16():
    problem = make_problem(num_tokens=64, vocab_size=300, padded_vocab_size=320)
    problem = problem.to(torch.bfloat16)
    truth = oracle_answer(problem, Settings())
    shard = problem.on("cuda").shard(0, 1)
    loss, metrics = run_fused(shard, Settings(), chunk_tokens=24)
    loss.backward()
    assert_close(metrics["loss_T"].double().cpu(), truth.loss_T, rtol=0.02, atol=0.02)
    for leaf, true_grad in (
        (shard.student_hidden, truth.grad_hidden),
        (shard.student_weight, truth.grad_weight),
    ):
        assert_close(leaf.grad.double().cpu(), true_grad, rtol=0.05, atol=0.02)
