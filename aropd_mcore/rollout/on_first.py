"""Work that one rank does for all."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

import torch.distributed as dist

from aropd_mcore.heartbeat import beat
from aropd_mcore.rollout.engine import RolloutFailed

T = TypeVar("T")

HEARTBEAT_SECONDS = 30.0
"""The others hear this often that the work goes on, so that no collective's time-out ends it."""


def on_first_rank(work: Callable[[], T]) -> T:
    """`work()`, called on the job's first rank alone; what it returns, on every rank.

    Args:
        work: takes part in no collective; it runs in a thread. Its result is pickled.
    Raises:
        RolloutFailed, ValueError: what work raises, on every rank alike. Anything else is a mistake
            of ours: raised as it is on the first rank, and as a RuntimeError on the others.
    Collectives: broadcasts of an object over the whole job; every rank must call it.
    """
    future = in_background(work) if dist.get_rank() == 0 else None
    told: list[Any] = [None]
    while told[0] is None:
        if future is not None:
            wait([future], HEARTBEAT_SECONDS)
            told[0] = _to_tell(future) if future.done() else None
        dist.broadcast_object_list(told, src=0)
        beat()
    if future is not None:
        return future.result()
    result, error = told[0]
    if error is not None:
        raise error
    return result


def in_background(work: Callable[[], T]) -> Future[T]:
    """`work()` in a thread that nobody has to wait for, not even an interrupted run."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _to_tell(future: Future[Any]) -> tuple[Any, BaseException | None]:
    error = future.exception()
    if error is None:
        return future.result(), None
    if isinstance(error, RolloutFailed | ValueError):
        return None, error
    return None, RuntimeError(f"on the first rank: {type(error).__name__}: {error}")
