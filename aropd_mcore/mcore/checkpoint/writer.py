"""Megatron's dist_checkpointing.save in the background, with a checksum of every file.

Each rank writes the files of its own tensors in a forked process (megatron-core 0.16.1,
dist_checkpointing/strategies/async_utils.py). The fork keeps the tensors' values while training
changes them. GPU tensors are copied to the host first, into pinned memory, which a fork shares with
this process. So these copies are kept until the write is done. A save that is waited for also runs
in a forked process, because torch's writer may crash on a full disk.

The writing process ends with its rank (lifetime.py), even in the middle of a file. The manifest is
written last, so an incomplete checkpoint is never used.
"""

import functools
import inspect
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.managers import SyncManager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies import common as common_strategies
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch.distributed.checkpoint.api import CheckpointException

from aropd_mcore import lifetime
from aropd_mcore.convert.manifest import FileSum, file_sums

_NICENESS = 10
"""Increment of the writing process's nice value (os.nice), since it may share cores with training.
"""


class Written(NamedTuple):
    """One rank's result of a save."""

    files: dict[str, FileSum]
    seconds: float
    """Duration of the write in seconds."""
    error: str | None
    """Reason of a failure, else None."""


class Writing:
    """A save in progress. Every rank creates one, may call `is_done`, and must call `finish`."""

    def __init__(self, state: dict[str, Any], folder: Path):
        """Take a snapshot of a state and start writing it to `folder`, which is empty.

        Collectives: those of dist_checkpointing.save. Every rank must call it.
        """
        self._errors: list[str] = []
        """This rank's errors. They are not raised here, so that all ranks run the same collectives.
        """
        self._queue = AsyncCallsQueue()
        self._is_finished = False
        self._host_copies: list[Any] = []
        """Host copies of GPU tensors that the writing process reads. megatron-core 0.16.1 frees
        them after the fork, and new tensors of this process could then overwrite them."""
        _prepare_results()
        self._results, results = multiprocessing.Pipe(duplex=False)
        with self._collecting_errors():
            request = _request(state, folder)
            if request.async_fn is not None:
                prefix = f"__{dist.get_rank()}_"  # Megatron's prefix of this rank's files
                write = functools.partial(
                    _write, request.async_fn, folder, prefix, results, os.getpid()
                )
                request = request._replace(async_fn=write)
                if request.preload_fn is not None:
                    request = request._replace(preload_fn=self._keeping(request.preload_fn))
            else:
                results.send(Written({}, 0.0, None))
            self._queue.schedule_async_request(request)
        results.close()  # only the writing process must hold this end

    def is_done(self) -> bool:
        """Return whether every rank has written its files.

        Collectives: an all-reduce over the job, and once all ranks have written, those of `finish`.
            Every rank must call it.
        """
        if not self._is_finished:
            self._finish(self._queue.maybe_finalize_async_calls)
        return self._is_finished

    def finish(self) -> tuple[Written, list[str]]:
        """Wait until every rank has written, and write Megatron's own index of the files.

        Returns:
            This rank's result, and further errors on this rank, which are often consequences of
            another rank's error.
        Collectives: Megatron's. Every rank must call it.
        """
        if not self._is_finished:
            self._finish(functools.partial(self._queue.maybe_finalize_async_calls, blocking=True))
        written = Written({}, 0.0, "the writing process died")  # for example out of memory
        with suppress(EOFError):
            written = self._results.recv()
        self._results.close()
        return written, self._errors

    def _finish(self, finalize: Callable[[], Any]) -> None:
        try:
            with self._collecting_errors():
                self._is_finished = finalize() != []  # a list of the finalized calls
        except CheckpointException as error:  # raised on every rank; not an Exception
            self._is_finished = True
            self._errors += [str(cause) for cause, _ in error.failures.values()]
        if self._is_finished:
            self._host_copies.clear()

    def _keeping(self, preload: Callable[[], Any]) -> Callable[[], Any]:
        def keeping() -> Any:
            self._host_copies.append(preload())
            return self._host_copies[-1]

        return keeping

    @contextmanager
    def _collecting_errors(self) -> Iterator[None]:
        """Collect the errors of Megatron's functions that run on rank 0 only.

        Rank 0 writes a few small files while the other ranks wait in a collective. An error raised
        there would make them hang. The ranks exchange the errors later.

        Source: serialization.py:411 and :422, state_dict_saver.py:243. Version 0.19 writes no
        common.pt.
        """
        places: list[tuple[Any, str]] = [
            (serialization, "save_config"),
            (FileSystemWriterAsync, "finish"),
        ]
        strategy = getattr(common_strategies, "TorchCommonSaveStrategy", None)
        if strategy is not None:
            places.append((strategy, "save_common"))
        usual = [getattr(place, name) for place, name in places]
        for (place, name), function in zip(places, usual, strict=True):
            setattr(place, name, self._collecting(function))
        try:
            yield
        finally:
            for (place, name), function in zip(places, usual, strict=True):
                setattr(place, name, function)

    def _collecting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def collecting(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except Exception as error:
                self._errors.append(_brief(error))

        return collecting


def _request(state: dict[str, Any], folder: Path) -> AsyncRequest:
    for sharded in nested_values(state):
        # Pinned memory is shared with a fork, so training would change the fork's values.
        if isinstance(sharded, ShardedTensor | ShardedTensorFactory):
            tensor = sharded.data
            if tensor is not None and tensor.device.type == "cpu" and tensor.is_pinned():
                sharded.data = tensor.clone()
    options: dict[str, Any] = {"async_sharded_save": True}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
        options["async_strategy"] = "mcore"  # 0.19; its other strategy needs another package
    request = dist_checkpointing.save(state, str(folder), **options)
    return cast(AsyncRequest, request)


def _prepare_results() -> None:
    """Create Megatron's results queue, or empty it of an abandoned save's results.

    If Megatron created the queue, its server process would survive a rank that is killed.
    """
    queue = filesystem_async._results_queue
    if queue is None:
        manager, parent = SyncManager(ctx=multiprocessing.get_context("spawn")), os.getpid()
        with _without_main():
            lifetime.in_lasting_thread(lambda: manager.start(lifetime.end_with_parent, (parent,)))
        queue = filesystem_async._results_queue = manager.Queue()
    while not queue.empty():
        queue.get()


@contextmanager
def _without_main() -> Iterator[None]:
    """Context in which spawned processes do not import `__main__`.

    By default, multiprocessing imports `__main__` in a spawned process. A script without a
    `__main__` guard would then train twice.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _write(
    write: Callable[..., None],
    folder: Path,
    prefix: str,
    results: Any,
    rank_pid: int,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Call Megatron's `write`, then compute the files' checksums. Runs in the writing process."""
    lifetime.end_with_parent(rank_pid)
    started = time.perf_counter()
    error = None
    files: dict[str, FileSum] = {}
    logger, first_error = logging.getLogger(filesystem_async.__name__), _FirstError()
    logger.addHandler(first_error)
    try:
        # These signals are for the training process, which waits for this one before it stops.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        os.nice(_NICENESS)
        write(*args, **kwargs)
        names = [path.name for path in folder.iterdir() if path.name.startswith(prefix)]
        files = file_sums(folder, names)
    except BaseException as failure:
        error = _brief(failure)
    # Megatron logs the error of a thread or process. The exception only states that there was one.
    error = first_error.text or error
    results.send(Written(files, time.perf_counter() - started, error))


class _FirstError(logging.Handler):
    """Log handler that keeps the first error that Megatron logs."""

    text: str | None = None

    def __init__(self) -> None:
        super().__init__(logging.ERROR)

    def emit(self, record: logging.LogRecord) -> None:
        self.text = self.text or record.getMessage()[:300]


def _brief(error: BaseException) -> str:
    """Return an error's type and first line, since the result has to fit into a pipe."""
    first_line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first_line[:300]}"
