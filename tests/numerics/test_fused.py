"""The fused form: split tokens, memory, and Megatron's gradient buffer."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, mm_flop

from aropd_mcore.numerics import chunks, passes
from tests.numerics.problems import Settings, make_problem, oracle_answer
from tests.numerics.runs import (
    counted_collectives,
    run_cross_entropy,
    run_fused,
    run_logits_form,
    run_one_view,
)
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.slow

CLOSE = {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False}


def check_token_parallel() -> None:
    """Check TP 2 x CP 2 with sequence parallelism, with 10 and 6 tokens, and with 16 and none.

    Ranks 0 and 1 are one context rank, 2 and 3 the other.
    """
    tp_rank, cp_rank = dist.get_rank() % 2, dist.get_rank() // 2
    tp_group = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])][cp_rank]
    cp_group = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])][tp_rank]
    whole = make_problem(num_tokens=16)
    for run, settings in ((run_fused, Settings()), (run_cross_entropy, None)):
        expected = oracle_answer(whole, settings)
        for num_first in (10, 16):
            first, end = ((0, num_first), (num_first, 16))[cp_rank]
            half = (end - first) // 2
            own = slice(first + tp_rank * half, first + (tp_rank + 1) * half)
            shard = whole.shard(tp_rank, 2).tokens(slice(first, end), hidden=own)
            with counted_collectives() as calls:
                loss, metrics = run(
                    shard, settings, tp_group, sequence_parallel=True, chunk_tokens=4
                )
            loss.backward()
            total = loss.detach()
            grad_weight = shard.student_weight.grad
            for sum_ in (total, grad_weight):
                dist.all_reduce(sum_, group=cp_group)
            assert_close(total, expected.loss, **CLOSE)
            assert_close(metrics["loss_T"], expected.loss_T[first:end], **CLOSE)
            assert_close(shard.student_hidden.grad, expected.grad_hidden[own], **CLOSE)
            assert_close(grad_weight, expected.grad_weight.chunk(2)[tp_rank], **CLOSE)
            num_chunks = (end - first + 3) // 4
            names = [name for name, _ in calls]
            num_streams, num_exchanges = (1, 1) if settings is None else (3, 2)
            num_gathers = (num_streams + num_exchanges) * num_chunks
            assert names.count("all_gather") == num_gathers
            assert names.count("reduce_scatter") == num_chunks == len(names) - num_gathers


def test_loss_with_sequence_and_context_parallelism_equals_the_whole():
    run_ranks(check_token_parallel, 4)


@pytest.mark.parametrize("run", [run_fused, run_cross_entropy])
def test_main_grad_accumulates_the_weights_gradient(run):
    """The weight's gradient is added to the buffer. The weight's hooks still run, as those of
    Megatron's DDP do, and backward creates no tensor of the weight's size."""
    settings = Settings() if run is run_fused else None
    expected = oracle_answer(make_problem(), settings)
    problem = make_problem().shard(0, 1)
    weight = problem.student_weight
    main_grad = torch.ones(weight.shape)
    ran = []

    def add_to_main_grad(*_: object) -> None:
        assert weight.grad is not None
        main_grad.add_(weight.grad)
        ran.append(weight.grad)
        weight.grad = None

    accumulate = weight.expand_as(weight).grad_fn.next_functions[0][0]
    accumulate.register_hook(add_to_main_grad)
    loss, _ = run(problem, settings, chunk_tokens=5, main_grad_VH=main_grad)
    before = main_grad.clone()
    with LargestNew() as largest:
        loss.backward()
    assert len(ran) == 1 and ran[0].shape == weight.shape
    assert largest.bytes <= problem.student_hidden.nbytes < weight.nbytes
    assert torch.equal(main_grad, before)
    assert_close(main_grad, 1 + expected.grad_weight, **CLOSE)
    assert_close(problem.student_hidden.grad, expected.grad_hidden, **CLOSE)


def test_main_grad_of_a_tied_weight_gets_the_embeddings_gradient():
    """The hook of a tied weight runs once, with the sum of both gradients."""
    problem = make_problem().shard(0, 1)
    weight = problem.student_weight
    main_grad = torch.zeros(weight.shape)
    loss, _ = run_fused(problem, Settings(), main_grad_VH=main_grad)
    head = main_grad.clone()
    (loss + 3 * weight[2].sum()).backward()
    main_grad.add_(weight.grad)
    head[2] += 3
    assert torch.equal(main_grad, head)


class LargestNew(TorchDispatchMode):
    """Context that finds the size of the largest tensor that operations create."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        old = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if is_dense(x)}
        for x in tree_leaves(out):
            if is_dense(x) and x.untyped_storage().data_ptr() not in old:
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out


def is_dense(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided


def test_main_grad_with_a_scaled_loss_raises():
    problem = make_problem().shard(0, 1)
    main_grad = torch.zeros(problem.student_weight.shape)
    loss, _ = run_fused(problem, Settings(), main_grad_VH=main_grad)
    with pytest.raises(RuntimeError, match="gradient of 1 x the loss"):
        (2 * loss).backward()


def test_main_grad_without_a_gradient_is_unchanged():
    problem = make_problem().shard(0, 1)
    main_grad = torch.zeros(problem.student_weight.shape)
    with torch.no_grad():
        run_fused(problem, Settings(), main_grad_VH=main_grad)
    assert (main_grad == 0).all()


def tensor_sizes(run) -> list[int]:
    """Return the number of elements of every tensor that an operation of `run()` returns."""
    sizes = []

    class RecordSizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(leaf.numel() for leaf in tree_leaves(out) if torch.is_tensor(leaf))
            return out

    with RecordSizes():
        run()
    return sizes


def test_memory_does_not_grow_with_tokens_times_vocabulary():
    """For any number of tokens, no tensor is larger than a chunk's temporaries or the weight."""
    largest = []
    for num_tokens in (64, 256):
        problem = make_problem(num_tokens, vocab_size=500, padded_vocab_size=512).shard(0, 1)
        sizes = tensor_sizes(
            lambda problem=problem: run_fused(problem, Settings(), chunk_tokens=4)[0].backward()
        )
        largest.append(max(sizes))
    assert largest == [6 * 4 * 500] * 2  # six temporaries of a chunk; its logits are three


@pytest.mark.parametrize("live, products", [(False, 2), (True, 1)])
def test_shared_head_of_a_live_teacher_needs_one_product(live, products):
    """One weight needs one product for all three views, and only the student gives gradients."""
    problem = make_problem().shard(0, 1)
    separate = replace(problem, teacher_weight=problem.student_weight.detach().clone())
    shared = replace(problem, teacher_weight=problem.student_weight.detach())
    problem = shared if live else separate
    with mock.patch.object(torch, "mm", wraps=torch.mm) as mm:
        run_fused(problem, Settings(), chunk_tokens=100)[0].backward()
    assert mm.call_count == products
    expected = oracle_answer(separate.shard(0, 1), Settings())
    assert_close(problem.student_weight.grad, expected.grad_weight, **CLOSE)


def add_product_flops(_sum, left, right, **_) -> int:
    return mm_flop(left, right)


def test_one_view_saves_one_product_and_one_softmax():
    """One view needs four products instead of five. Five softmaxes remain: student, target and
    log u, and two in the gradient."""
    problem = make_problem().shard(0, 1)
    product = 2 * 13 * 8 * 45
    settings = Settings(residual_scale=0)
    for run, num_products, num_softmaxes in ((run_fused, 5, 6), (run_one_view, 4, 5)):
        counter = FlopCounterMode(
            display=False, custom_mapping={torch.ops.aten.addmm_: add_product_flops}
        )
        kwargs = {"with_metrics": False} if run is run_fused else {}
        softmax = mock.patch.object(torch, "softmax", wraps=torch.softmax)
        with counter, softmax as softmaxes:
            run(problem, settings, **kwargs)[0].backward()
        assert counter.get_total_flops() == num_products * product
        assert softmaxes.call_count == num_softmaxes


@pytest.mark.parametrize("run", [run_fused, run_logits_form, run_cross_entropy])
def test_loss_on_several_threads_gives_each_thread_whole_blocks(run, monkeypatch):
    """Within a block torch has one thread, so no operation waits for the threads of another."""
    monkeypatch.setitem(passes.BLOCK_ELEMENTS, "cpu", 2 * 45)
    settings = None if run is run_cross_entropy else Settings()
    expected = oracle_answer(make_problem(), settings)
    threads, usual = [], torch.get_num_threads()

    def softmax(*args, **kwargs):
        threads.append((threading.get_ident(), torch.get_num_threads()))
        return torch_softmax(*args, **kwargs)

    torch_softmax = torch.softmax
    monkeypatch.setattr(torch, "softmax", softmax)
    try:
        torch.set_num_threads(2)
        problem = make_problem().shard(0, 1)
        loss, metrics = run(problem, settings)
        loss.backward()
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(usual)
    assert {number for _, number in threads} == {1}
    assert threading.get_ident() not in {thread for thread, _ in threads}
    assert_close(metrics["loss_T"], expected.loss_T, **CLOSE)
    assert_close(problem.student_hidden.grad, expected.grad_hidden, **CLOSE)
    assert_close(problem.student_weight.grad, expected.grad_weight, **CLOSE)


def test_auto_chunk_tokens_fits_the_budget_in_even_chunks(monkeypatch):
    weight = torch.empty(1000, 8)
    monkeypatch.setitem(chunks.LOGITS_BYTES, "cpu", 3 * 1000 * 4 * 200)  # 200 tokens' logits
    many = 192 * 384
    assert chunks.auto_chunk_tokens(3, weight, many) == 192
    assert chunks.auto_chunk_tokens(3, weight.bfloat16(), many) == 128, "14 bytes instead of 12"
    assert chunks.auto_chunk_tokens(3, weight, 193) == 128, "two even chunks, not 192 and 1"
    monkeypatch.setitem(chunks.LOGITS_BYTES, "cpu", 1)
    assert chunks.auto_chunk_tokens(3, weight, many) == 64
    assert chunks.auto_chunk_tokens(3, weight, 0) == 64
    problem = make_problem(num_tokens=130)
    sizes = tensor_sizes(lambda: run_fused(problem, Settings()))
    assert 3 * 64 * 45 in sizes and 3 * 130 * 45 not in sizes
