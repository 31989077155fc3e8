"""Work that is split over the CPU's threads by items, not within torch's operations.

If every operation on a block is split over the threads, they wait for one another after each
operation. A thread whose core is busy with another process then delays all of them, thousands of
times per loss. Here each thread computes its own items, and the threads wait once, at the end.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def on_threads(work: Callable[[T], R], items: Sequence[T], device: torch.device) -> list[R]:
    """Call `work` for every item without a gradient, and return the results in order.

    On a CPU, as many threads as torch has take the next item whenever they are free. Within `work`
    torch then has one thread, so that nested calls run in theirs. On a GPU there is one thread.

    Args:
        device: device of the tensors that `work` computes with.
    """

    def on_one_thread(item: T) -> R:
        torch.set_num_threads(1)
        with torch.no_grad():  # a new thread has gradients enabled
            return work(item)

    num_threads = min(torch.get_num_threads(), len(items))
    if device.type != "cpu" or num_threads <= 1:
        with torch.no_grad():
            return [work(item) for item in items]
    usual = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(num_threads) as pool:
            return list(pool.map(on_one_thread, items))
    finally:
        torch.set_num_threads(usual)  # also of threads that are created later
