"""Attention with sinks, against the formula."""

import torch
from torch import Tensor
from torch.testing import assert_close

from aropd_mcore.mcore.cached_attention import CachedAttention, Places
from aropd_mcore.mcore.patches.local_attention import attend, causal_mask

ROWS, HEADS, GROUPS, LENGTH, DIM = 2, 8, 4, 11, 24
SCALE = 0.3


def parts(*, requires_grad: bool = False) -> list[Tensor]:
    """Return queries, keys, values and sinks in fp64."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(ROWS, heads, LENGTH, DIM) for heads in (HEADS, GROUPS, GROUPS)]
    tensors = [torch.randn(shape, generator=generator).double() for shape in [*shapes, (HEADS,)]]
    tensors[-1] *= 3
    return [tensor.requires_grad_(requires_grad) for tensor in tensors]


def formula(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, visible: Tensor) -> Tensor:
    """Compute exp(l_j) / (exp(sink) + sum_j exp(l_j)) for the logits l_j of the visible keys."""
    key, value = (part.repeat_interleave(HEADS // GROUPS, 1) for part in (key, value))
    weights = (query @ key.mT * SCALE).exp() * visible
    return weights / (sinks.exp()[:, None, None] + weights.sum(-1, keepdim=True)) @ value


def test_attention_with_sinks_equals_the_formula_with_its_gradients():
    for window in (None, 4):
        mask = causal_mask(LENGTH, LENGTH, window, torch.device("cpu"))
        visible = torch.ones(LENGTH, LENGTH).tril() if mask is None else mask
        ours, theirs = parts(requires_grad=True), parts(requires_grad=True)
        actual = attend(*ours[:3], visible_SL=mask, scale=SCALE, sinks_M=ours[3])
        expected = formula(*theirs, visible)
        assert_close(actual, expected)
        for result in (actual, expected):
            result.square().sum().backward()
        for one, other in zip(ours, theirs, strict=True):
            assert_close(one.grad, other.grad)


def test_cached_attention_with_sinks_equals_the_formula():
    """Prompts of both rows first, then the remaining tokens one by one."""
    query, key, value, sinks = parts()
    for window in (None, 4):
        mask = causal_mask(LENGTH, LENGTH, window, torch.device("cpu"))
        visible = torch.ones(LENGTH, LENGTH).tril() if mask is None else mask
        expected = formula(query, key, value, sinks, visible)
        places = Places(window=window)
        keys, values = torch.zeros(2, ROWS, GROUPS, LENGTH + 1, DIM, dtype=torch.float64)
        attention = CachedAttention(
            places, keys, values, SCALE, has_window=window is not None, sinks=sinks
        )
        places.place_prompts([0, 1], [[5] * 6, [5] * 6], torch.device("cpu"))
        tokens = [
            part[:, :, :6].transpose(1, 2).flatten(0, 1)[:, None] for part in (query, key, value)
        ]
        found = [attention(*tokens).view(ROWS, 6, HEADS, DIM).transpose(1, 2)]
        for position in range(6, LENGTH):
            places.place_next(slice(0, ROWS), torch.full((ROWS,), position), LENGTH, torch.float64)
            tokens = [part[:, :, position][:, None] for part in (query, key, value)]
            found.append(attention(*tokens).view(ROWS, 1, HEADS, DIM).transpose(1, 2))
        assert_close(torch.cat(found, dim=2), expected)
