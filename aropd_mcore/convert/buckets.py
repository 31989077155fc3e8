"""Cutting of a model's weights into buckets that are gathered, written or sent at once."""

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import TypeVar

from aropd_mcore.convert.model import Weight

T = TypeVar("T")


def tensor_bytes(weights: Iterable[Weight], element_bytes: int) -> list[int]:
    """Return the sizes of the weights' HF tensors in bytes.

    Args:
        element_bytes: size of an element of the parameters. Buffers are in fp32.
    """
    return [
        math.prod(shape) * (4 if weight.is_buffer else element_bytes)
        for weight in weights
        for shape in weight.hf.values()
    ]


def runs(
    weights: Sequence[Weight],
    element_bytes: int,
    limit: int,
    owner: Callable[[Weight], Hashable] = lambda _: None,
) -> Iterator[tuple[Weight, ...]]:
    """Yield consecutive weights of the same owner and dtype.

    A run has up to `limit` bytes, or a single weight.
    """
    run: list[Weight] = []
    filled = 0

    def kind(weight: Weight) -> Hashable:
        return owner(weight), weight.is_buffer

    for weight in weights:
        size = sum(tensor_bytes([weight], element_bytes))
        if run and (filled + size > limit or kind(weight) != kind(run[0])):
            yield tuple(run)
            run, filled = [], 0
        run.append(weight)
        filled += size
    if run:
        yield tuple(run)


def shares(
    weights: Sequence[Weight], element_bytes: int, num_owners: int, limit: int
) -> Iterator[tuple[tuple[Weight, ...], int]]:
    """Yield `runs`, each with its owner, so that owners get similar numbers of bytes."""
    loads = [0] * num_owners
    share = -(-sum(tensor_bytes(weights, element_bytes)) // num_owners)
    for run in runs(weights, element_bytes, min(limit, share)):
        owner = loads.index(min(loads))
        loads[owner] += sum(tensor_bytes(run, element_bytes))
        yield run, owner


def receiver_buckets(
    items: Iterable[T], num_bytes: Callable[[T], int], limit: int
) -> Iterator[list[T]]:
    """Yield the buckets that vLLM's receiver expects.

    A bucket ends with the first item that makes it larger than `limit` bytes.
    """
    bucket: list[T] = []
    size = 0
    for item in items:
        bucket.append(item)
        size += num_bytes(item)
        if size > limit:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket
