"""Division of work over threads. Reading and writing of files releases the GIL."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

NUM_THREADS = 2
"""Number of threads. Two threads saturate most disks and leave a login node's cores to others."""

T = TypeVar("T")


def share_out(items: Iterable[T], size: Callable[[T], int]) -> list[list[T]]:
    """Divide items into NUM_THREADS shares of similar total size, each in the items' order."""
    shares: list[list[T]] = [[] for _ in range(NUM_THREADS)]
    sizes = [0] * NUM_THREADS
    for item in items:
        least = sizes.index(min(sizes))
        shares[least].append(item)
        sizes[least] += size(item)
    return shares


def in_threads(shares: Sequence[Sequence[T]], work: Callable[[Iterator[T]], None]) -> None:
    """Run `work` on all shares in parallel. The first error or an interrupt stops all threads."""
    stop = threading.Event()

    def until_stopped(share: Sequence[T]) -> Iterator[T]:
        for item in share:
            if stop.is_set():
                return
            yield item

    def run(share: Sequence[T]) -> None:
        try:
            work(until_stopped(share))
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(len(shares)) as pool:
        futures = [pool.submit(run, share) for share in shares]
        try:
            for future in futures:
                future.result()
        except BaseException:
            stop.set()
            raise
