"""Work that rank 0 does for all ranks of the job."""

import pickle
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

import torch.distributed as dist

from aropd_mcore.heartbeat import beat

T = TypeVar("T")

HEARTBEAT_SECONDS = 30.0
"""How often the other ranks hear that work with `takes_long` is not done yet."""


def run_on_rank0(work: Callable[[], T], *, takes_long: bool = False) -> T:
    """Call `work()` on rank 0 only; return its result, or raise its error, on every rank.

    Without it, an error on rank 0 only would leave the other ranks waiting in the next collective.

    Args:
        work: takes part in no collective. Its result is pickled.
        takes_long: for work that may outlast the timeout of a collective and has timeouts of its
            own. It runs in a thread; meanwhile every rank shows the watchdog that it is alive.
    Raises:
        What work raises, on every rank. On the ranks other than 0 the error has the attribute
        is_from_rank0, and an error that cannot be pickled is replaced by a RuntimeError with its
        text.
    Collectives: broadcasts of an object over the job; every rank must call it.
    """
    future: Future[T] | None = None
    if dist.get_rank() == 0:
        future = in_background(work) if takes_long else _done(work)
    outcome: list[Any] = [None]
    while outcome[0] is None:
        if future is not None:
            wait([future], HEARTBEAT_SECONDS)
            outcome[0] = _outcome(future) if future.done() else None
        dist.broadcast_object_list(outcome, src=0)
        if takes_long:
            beat()
    if future is not None:
        return future.result()  # an error with its traceback
    result, error = outcome[0]
    if error is not None:
        error.is_from_rank0 = True  # pyright: ignore[reportAttributeAccessIssue]
        raise error
    return result


def in_background(work: Callable[[], T]) -> Future[T]:
    """Call `work()` in a daemon thread, which does not keep an interrupted run from ending."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _done(work: Callable[[], T]) -> Future[T]:
    future: Future[T] = Future()
    try:
        future.set_result(work())
    except Exception as error:
        future.set_exception(error)
    return future


def _outcome(future: Future[Any]) -> tuple[Any, BaseException | None]:
    """Result and error of rank 0, as the other ranks get them."""
    error = future.exception()
    if error is None:
        return future.result(), None
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return None, RuntimeError(f"on rank 0: {type(error).__name__}: {error}")
    return None, error
