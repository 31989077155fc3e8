"""Work at the start of a run that its processes share out."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rich.console import Console
from rich.progress import track

from aropd_mcore.config import hub_name
from aropd_mcore.data.records import DataError

T = TypeVar("T")
U = TypeVar("U")


class Ranks(Protocol):
    """The processes of a job. `mcore.runtime.Runtime` is one."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def local_rank(self) -> int:
        """Number of this process among those of its machine."""
        ...

    def gather(self, part: Any) -> list[Any]:
        """Return the parts of all ranks, in rank order. Every rank must call it."""
        ...


class OneRank:
    """A process that is the whole job, such as a dry run on a login node."""

    rank = 0
    world_size = 1
    local_rank = 0

    def gather(self, part: T) -> list[T]:
        return [part]


def share_of(ranks: Ranks, items: Sequence[T], label: str) -> Iterable[tuple[int, T]]:
    """Yield this rank's items with their indices: every world_size-th one.

    If stderr is a terminal, rank 0 shows its progress there.
    """
    console = Console(stderr=True)
    return track(
        [(index, items[index]) for index in range(ranks.rank, len(items), ranks.world_size)],
        label,
        console=console,
        disable=ranks.rank > 0 or not console.is_terminal,
        transient=True,
    )


def raise_first(errors: Iterable[tuple[int, DataError]]) -> None:
    """Raise the error of the item with the lowest index, if there are errors."""
    first = min(errors, key=lambda found: found[0], default=None)
    if first is not None:
        raise first[1]


def map_shared(ranks: Ranks, function: Callable[[T], U], items: Sequence[T], label: str) -> list[U]:
    """Call a function for each item on one rank only, and return all results on every rank.

    Args:
        items: the same on every rank.
        label: description of the work for the progress bar.
    Raises:
        DataError: the error of the first item for which the function raises one, on every rank.
    Collectives: one gather, of the results.
    """
    results: list[tuple[int, U]] = []
    error: tuple[int, DataError] | None = None
    for index, item in share_of(ranks, items, label):
        try:
            results.append((index, function(item)))
        except DataError as problem:
            error = (index, problem)
            break
    parts = ranks.gather((results, error))
    raise_first(error for _, error in parts if error)
    return [result for _, result in sorted(found for results, _ in parts for found in results)]


def load_in_turn(ranks: Ranks, load: Callable[[], T], sources: Iterable[Path]) -> T:
    """Call `load` on every rank. If it reads from the hub, the first rank of each machine calls it
    first, so that the others find the data in the cache.

    Args:
        sources: sources that `load` reads, the same on every rank.
    Raises:
        ValueError: the error of `load`. One of a first rank is raised on every rank.
    Collectives: one gather if a source is a data set of the hub.
    """
    if all(hub_name(source) is None for source in sources):
        return load()
    result: T | None = None
    error: ValueError | None = None
    if ranks.local_rank == 0:
        try:
            result = load()
        except ValueError as problem:
            error = problem
    for problem in ranks.gather(error):
        if problem is not None:
            raise problem
    return load() if result is None else result
