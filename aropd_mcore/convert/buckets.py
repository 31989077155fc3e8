"""Cutting of a model's weights into buckets that are gathered, written or sent at once."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from aropd_mcore.convert.model import Weight

T = TypeVar("T")


def count_elements(weights: Iterable[Weight]) -> int:
    """Count the elements of the weights' HF tensors."""
    return sum(math.prod(shape) for weight in weights for shape in weight.hf.values())


def runs(
    weights: Sequence[Weight],
    element_bytes: int,
    limit: int,
    owner: Callable[[Weight], int | None] = lambda _: None,
) -> Iterator[tuple[Weight, ...]]:
    """Yield consecutive weights of the same owner, up to `limit` bytes of them or a single one."""
    run: list[Weight] = []
    filled = 0
    for weight in weights:
        size = count_elements([weight]) * element_bytes
        if run and (filled + size > limit or owner(weight) != owner(run[0])):
            yield tuple(run)
            run, filled = [], 0
        run.append(weight)
        filled += size
    if run:
        yield tuple(run)


def shares(
    weights: Sequence[Weight], element_bytes: int, num_owners: int, limit: int
) -> Iterator[tuple[tuple[Weight, ...], int]]:
    """Yield runs of weights, each with its owner, so that owners get similar numbers of bytes."""
    loads = [0] * num_owners
    share = -(-count_elements(weights) * element_bytes // num_owners)
    for run in runs(weights, element_bytes, min(limit, share)):
        owner = loads.index(min(loads))
        loads[owner] += count_elements(run)
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
