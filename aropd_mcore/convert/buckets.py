"""Cutting of a model's weights into buckets that are gathered, written or sent at once."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

from aropd_mcore.convert.mapping import HEAD
from aropd_mcore.convert.model import Architecture, Weight


def without_tied_head(architecture: Architecture) -> list[Weight]:
    """Return the table's weights without a tied head, which repeats the embedding."""
    is_repeated = architecture.tied_embeddings
    return [w for w in architecture.weights() if not (is_repeated and w.name == HEAD.name)]


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


def packed_sizes(tensor_bytes: Iterable[int], limit: int) -> list[int]:
    """Return the sizes of the buckets that vLLM's receiver expects for tensors of these sizes.

    A bucket ends with the first tensor that makes it larger than `limit`.
    """
    sizes, size = [], 0
    for num_bytes in tensor_bytes:
        size += num_bytes
        if size > limit:
            sizes.append(size)
            size = 0
    return sizes + [size] * (size > 0)
