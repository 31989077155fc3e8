"""Which samples form a microbatch: by number, or as many as a budget of tokens holds.

Pure functions of lengths: every rank computes the groups of all ranks and takes its own.

Shape letters: N samples.
"""

from collections.abc import Sequence

Groups = list[list[int]]
"""One list of sample indices a microbatch; an empty one has no sample."""


def consecutive(num_samples: int, size: int) -> Groups:
    """Microbatches of `size` samples in order, the last of which may be smaller."""
    indices = list(range(num_samples))
    return [indices[start : start + size] for start in range(0, num_samples, size)]


def packed(
    lengths_N: Sequence[tuple[int, ...]],
    *,
    num_ranks: int,
    budget: int,
    count_multiple: int = 1,
) -> list[Groups]:
    """Share out samples over data-parallel ranks by token count, and fill microbatches.

    Args:
        lengths_N: each sample's tokens in each view, as they take place in a packed sequence.
        num_ranks: data-parallel ranks.
        budget: tokens that a microbatch has at most in any view.
        count_multiple: of which the number of microbatches must be a multiple.
    Returns:
        The microbatches of each rank, equally many on all of them.
    Raises:
        ValueError: a sample alone exceeds the budget.
    """
    ranks = [_first_fit(share, lengths_N, budget) for share in _shares(lengths_N, num_ranks)]
    count = max(len(groups) for groups in ranks)
    count += -count % count_multiple
    return [_split_into(groups, count) for groups in ranks]


def _shares(lengths_N: Sequence[tuple[int, ...]], num_ranks: int) -> list[list[int]]:
    """Longest first, each to the rank with the fewest tokens so far (LPT scheduling, Graham 1969:
    at most 4/3 of the best maximum)."""
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    tokens = [0] * num_ranks
    for index in _longest_first(range(len(lengths_N)), lengths_N):
        rank = tokens.index(min(tokens))
        shares[rank].append(index)
        tokens[rank] += sum(lengths_N[index])
    return shares


def _first_fit(share: Sequence[int], lengths_N: Sequence[tuple[int, ...]], budget: int) -> Groups:
    """First fit decreasing: each sample, longest first, into the first group that has room."""
    groups: Groups = []
    filled: list[list[int]] = []
    for index in _longest_first(share, lengths_N):
        lengths = lengths_N[index]
        if max(lengths) > budget:
            raise ValueError(
                f"a sample has {max(lengths)} tokens, more than the {budget} of a microbatch"
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
    """`count` groups: the largest ones are halved; empty ones where there are too few samples."""
    groups = [list(group) for group in groups]
    while len(groups) < count:
        largest = max(groups, key=len, default=[])
        half = largest[1::2]
        largest[:] = largest[::2]
        groups.append(half)
    return groups


def _longest_first(indices: Sequence[int], lengths_N: Sequence[tuple[int, ...]]) -> list[int]:
    return sorted(indices, key=lambda index: (-sum(lengths_N[index]), index))
