"""Work that one rank does for all."""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

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
    outcome: list[tuple[Any, Exception | None]] = []

    def run() -> None:
        try:
            outcome.append((work(), None))
        except Exception as error:
            outcome.append((None, error))

    is_first = dist.get_rank() == 0
    # A daemon: an interrupted run must not wait for it.
    thread = threading.Thread(target=run, daemon=True)
    if is_first:
        thread.start()
    told: list[Any] = [None]
    while told[0] is None:
        if is_first:
            thread.join(HEARTBEAT_SECONDS)
            told[0] = _to_tell(*outcome[0]) if outcome else None
        dist.broadcast_object_list(told, src=0)
    result, error = outcome[0] if is_first else told[0]
    if error is not None:
        raise error
    return result


def _to_tell(result: Any, error: Exception | None) -> tuple[Any, Exception | None]:
    if error is None or isinstance(error, RolloutFailed | ValueError):
        return result, error
    return None, RuntimeError(f"on the first rank: {type(error).__name__}: {error}")
