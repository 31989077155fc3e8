"""Calls that run on rank 0 for all ranks of the job."""

import pickle
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import nullcontext
from typing import Any, TypeVar

import torch.distributed as dist

from aropd_mcore.heartbeat import beat, beating

T = TypeVar("T")

HEARTBEAT_SECONDS = 30.0
"""Interval in seconds at which rank 0 informs the other ranks that long work is still running, and
at which waiting ranks send heartbeats."""


def run_on_rank0(work: Callable[[], T], *, takes_long: bool = False) -> T:
    """Call `work()` on rank 0 only. Return its result, or raise its error, on every rank.

    If the error were raised on rank 0 only, the other ranks would hang in the next collective.

    While the other ranks wait, for `work` or for rank 0 to arrive here, they send their watchdogs
    heartbeats. Only rank 0's own watchdog judges whether rank 0 makes progress.

    Args:
        work: a function without collectives. Its result is pickled.
        takes_long: whether `work` may outlast the timeout of a collective and has its own timeouts.
            If so, it runs in a thread, and rank 0 sends heartbeats meanwhile.
    Raises:
        The error that `work` raises, on every rank. On the ranks other than 0 the error has the
        attribute is_from_rank0, and an error that cannot be pickled is replaced by a RuntimeError
        with its text.
    Collectives: broadcasts of an object over the job. Every rank must call it.
    """
    future: Future[T] | None = None
    if dist.get_rank() == 0:
        future = in_background(work) if takes_long else _done(work)
    outcome: list[Any] = [None]
    while outcome[0] is None:
        if future is not None:
            wait([future], HEARTBEAT_SECONDS)
            outcome[0] = _outcome(future) if future.done() else None
        with nullcontext() if dist.get_rank() == 0 else beating(HEARTBEAT_SECONDS):
            dist.broadcast_object_list(outcome, src=0)
        if takes_long:
            beat()
    if future is not None:
        return future.result()  # raises the error with its traceback
    result, error = outcome[0]
    if error is not None:
        error.is_from_rank0 = True  # pyright: ignore[reportAttributeAccessIssue]
        raise error
    return result


def in_background(work: Callable[[], T]) -> Future[T]:
    """Call `work()` in a daemon thread, so that an interrupted run can exit."""
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
    """Return rank 0's result and error in the form that is sent to the other ranks."""
    error = future.exception()
    if error is None:
        return future.result(), None
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return None, RuntimeError(f"on rank 0: {type(error).__name__}: {error}")
    return None, error
