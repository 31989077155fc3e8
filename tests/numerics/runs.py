"""Functions that run the losses on a problem and return (loss, metrics with loss_T)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from aropd_mcore.numerics import (
    fused_linear_anchored_residual_kl,
    fused_linear_cross_entropy,
    vocab_parallel_anchored_residual_kl,
)
from tests.numerics.problems import Problem, Settings

Result = tuple[Tensor, dict[str, Tensor]]


def run_fused(problem: Problem, settings: Settings, tp_group=None, **kwargs) -> Result:
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


def run_one_view(problem: Problem, settings: Settings, tp_group=None, **kwargs) -> Result:
    """Run the fused form with only the view that is the target, without metrics."""
    is_partial = settings.residual_scale == 0
    return fused_linear_anchored_residual_kl(
        problem.student_hidden,
        problem.student_weight,
        problem.partial_hidden if is_partial else None,
        None if is_partial else problem.full_hidden,
        problem.teacher_weight,
        problem.token_weights,
        vocab_size=problem.vocab_size,
        with_metrics=False,
        tp_group=tp_group,
        **asdict(settings),
        **kwargs,
    )


def run_logits_form(problem: Problem, settings: Settings, tp_group=None, **kwargs) -> Result:
    """Run the logits form behind an output layer of plain autograd."""
    loss_T, metrics = vocab_parallel_anchored_residual_kl(
        *problem.logits(),
        vocab_size=problem.vocab_size,
        sampled_ids_T=problem.sampled_ids,
        tp_group=tp_group,
        **asdict(settings),
        **kwargs,
    )
    return (problem.token_weights * loss_T).sum(), metrics | {"loss_T": loss_T.detach()}


def run_cross_entropy(problem: Problem, _: Settings | None, tp_group=None, **kwargs) -> Result:
    return fused_linear_cross_entropy(
        problem.student_hidden,
        problem.student_weight,
        problem.sampled_ids,
        problem.token_weights,
        vocab_size=problem.vocab_size,
        tp_group=tp_group,
        **kwargs,
    )


_COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object")
_COLLECTIVES += ("reduce_scatter", "reduce_scatter_tensor", "all_to_all_single")
_COLLECTIVES += ("broadcast", "reduce", "barrier")


@contextmanager
def counted_collectives() -> Iterator[list[tuple[str, int]]]:
    """Record the collectives within the context: name, and number of bytes that this rank sends."""
    calls: list[tuple[str, int]] = []

    def counting(name: str):
        run = getattr(dist, name)
        # The input tensor follows the output, if there is one.
        position = 1 if name.startswith(("all_gather", "reduce_scatter")) else 0

        def counted(*args, **kwargs):
            inputs = tree_leaves(args[position : position + 1])
            calls.append((name, sum(x.nbytes for x in inputs if torch.is_tensor(x))))
            return run(*args, **kwargs)

        return counted

    with mock.patch.multiple(dist, **{name: counting(name) for name in _COLLECTIVES}):
        yield calls
