"""Grouping of samples into microbatches, by a number of samples or by a token budget.

The functions depend only on lengths: every rank computes the groups of all ranks and takes its own.

Shape letters: N samples.
"""

from collections.abc import Sequence

Groups = list[list[int]]
"""Lists of sample indices, one list per microbatch. A list may be empty."""


def consecutive(num_samples: int, size: int) -> Groups:
    """Form microbatches of `size` samples in order. The last one may be smaller."""
    indices = list(range(num_samples))
    return [indices[start : start + size] for start in range(0, num_samples, size)]


def packed(
    lengths_N: Sequence[tuple[int, ...]],
    *,
    num_ranks: int,
    budget: int,
    count_multiple: int = 1,
    loads: Sequence[int] | None = None,
) -> list[Groups]:
    """Divide samples over data-parallel ranks by token count, and fill microbatches.

    Args:
        lengths_N: number of tokens of each sample in each view, with the padding of packing.
        num_ranks: number of data-parallel ranks.
        budget: maximum number of tokens of a microbatch in any view.
        count_multiple: the number of microbatches becomes a multiple of this number.
        loads: number of tokens of other samples that each rank has already. None: 0.
    Returns:
        The microbatches of each rank. All ranks have the same number of microbatches.
    Raises:
        ValueError: one sample exceeds the budget.
    """
    shares = _shares(lengths_N, loads or [0] * num_ranks)
    return _same_count([_first_fit(share, lengths_N, budget) for share in shares], count_multiple)


def dealt(
    num_samples: int, *, num_ranks: int, first_rank: int, size: int, count_multiple: int = 1
) -> list[Groups]:
    """Deal samples to the data-parallel ranks in turn, and form microbatches of `size`.

    Args:
        first_rank: rank of the first sample. Numbers beyond the last rank start again at 0.
        size: number of samples of a microbatch. Some may be smaller.
        count_multiple: see `packed`.
    Returns:
        The microbatches of each rank. All ranks have the same number of microbatches.
    """
    shares = [range((r - first_rank) % num_ranks, num_samples, num_ranks) for r in range(num_ranks)]
    groups = [[[share[i] for i in g] for g in consecutive(len(share), size)] for share in shares]
    return _same_count(groups, count_multiple)


def _same_count(ranks: Sequence[Groups], multiple: int) -> list[Groups]:
    """Split groups so that all ranks have the same number of them, a multiple of `multiple`."""
    count = max(len(groups) for groups in ranks)
    count += -count % multiple
    return [_split_into(groups, count) for groups in ranks]


def _shares(lengths_N: Sequence[tuple[int, ...]], loads: Sequence[int]) -> list[list[int]]:
    """Assign each sample, longest first, to the rank with the fewest tokens so far.

    This is LPT scheduling (Graham 1969): the maximum is at most 4/3 of the optimum.
    """
    shares: list[list[int]] = [[] for _ in loads]
    tokens = list(loads)
    for index in _longest_first(range(len(lengths_N)), lengths_N):
        rank = tokens.index(min(tokens))
        shares[rank].append(index)
        tokens[rank] += sum(lengths_N[index])
    return shares


def _first_fit(share: Sequence[int], lengths_N: Sequence[tuple[int, ...]], budget: int) -> Groups:
    """Put each sample, longest first, into the first group with room (first fit decreasing)."""
    groups: Groups = []
    filled: list[list[int]] = []
    for index in _longest_first(share, lengths_N):
        lengths = lengths_N[index]
        if max(lengths) > budget:
            raise ValueError(
                f"a sample has {max(lengths)} tokens, expected at most {budget} per microbatch"
            )
        for group, used in zip(groups, filled, strict=True):
            if all(u + length <= budget for u, length in zip(used, lengths, strict=True)):
                group.append(index)
                used[:] = [u + length for u, length in zip(used, lengths, strict=True)]
                break
        else:
            groups.append([index])
            filled.append(list(lengths))
    return groups


def _split_into(groups: Groups, count: int) -> Groups:
    """Halve the largest groups until there are `count`. Groups are empty if samples run out."""
    groups = [list(group) for group in groups]
    while len(groups) < count:
        largest = max(groups, key=len, default=[])
        half = largest[1::2]
        largest[:] = largest[::2]
        groups.append(half)
    return groups


def _longest_first(indices: Sequence[int], lengths_N: Sequence[tuple[int, ...]]) -> list[int]:
    return sorted(indices, key=lambda index: (-sum(lengths_N[index]), index))
