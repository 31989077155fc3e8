"""Megatron's dist_checkpointing.save in the background, with a checksum of every file.

Each rank writes the files of its own tensors, in a process forked for it (megatron-core 0.16.1,
dist_checkpointing/strategies/async_utils.py): the fork holds the tensors as they were, whatever
training does to them meanwhile; those of a GPU are copied to the host first. Who wants to wait does
so: in a process of its own all the same, since torch's writer may crash on a full disk.

The writing processes end with their rank (lifetime.py), even in the middle of a file. The manifest
is written last, so a checkpoint that they leave behind is never taken for a whole one.
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

_PATIENCE = 10
"""How much nicer than training the writing process is (os.nice), where they share cores."""


class Written(NamedTuple):
    """What a rank has written."""

    files: dict[str, FileSum]
    seconds: float
    """That it took."""
    error: str | None
    """Why it could not."""


class Writing:
    """One save under way. Every rank begins it, asks `is_done` or not, and calls `finish`."""

    def __init__(self, state: dict[str, Any], folder: Path):
        """Take the values of a state and start writing them to files of `folder`, which is empty.

        Collectives: dist_checkpointing.save's; every rank must call it.
        """
        self._errors: list[str] = []
        """What went wrong on this rank; raised by nobody, so that all ranks go on in step."""
        self._queue = AsyncCallsQueue()
        self._is_finished = False
        _prepare_results()
        self._results, results = multiprocessing.Pipe(duplex=False)
        with self._no_rank_waits_in_vain():
            request = _request(state, folder)
            if request.async_fn is not None:
                prefix = f"__{dist.get_rank()}_"  # Megatron's, of this rank's files
                write = functools.partial(
                    _write, request.async_fn, folder, prefix, results, os.getpid()
                )
                request = request._replace(async_fn=write)
            else:
                results.send(Written({}, 0.0, None))
            self._queue.schedule_async_request(request)
        results.close()  # the other process's end is the one that counts

    def is_done(self) -> bool:
        """Whether every rank has written its files.

        Collectives: an all-reduce over the job, and where it says yes those of `finish`.
        """
        if not self._is_finished:
            self._finish(self._queue.maybe_finalize_async_calls)
        return self._is_finished

    def finish(self) -> tuple[Written, list[str]]:
        """Wait until every rank has written, and write Megatron's own index of the files.

        Returns:
            What this rank has written, and what else went wrong on it: often what follows from
            another rank's error.
        Collectives: Megatron's; every rank must call it.
        """
        if not self._is_finished:
            self._finish(functools.partial(self._queue.maybe_finalize_async_calls, blocking=True))
        written = Written({}, 0.0, "the process that writes has died")  # killed, out of memory
        with suppress(EOFError):
            written = self._results.recv()
        self._results.close()
        return written, self._errors

    def _finish(self, finalize: Callable[[], Any]) -> None:
        try:
            with self._no_rank_waits_in_vain():
                self._is_finished = finalize() != []  # of the calls that it has finalized
        except CheckpointException as error:  # on every rank alike, and no Exception
            self._is_finished = True
            self._errors += [str(cause) for cause, _ in error.failures.values()]

    @contextmanager
    def _no_rank_waits_in_vain(self) -> Iterator[None]:
        """Megatron's first rank alone writes a few small files, while the others wait for it in a
        collective: what goes wrong is noted and not raised, until all can be told.

        serialization.py:411 and :422, state_dict_saver.py:243; 0.19 has no common.pt of its own.
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
            setattr(place, name, self._noting(function))
        try:
            yield
        finally:
            for (place, name), function in zip(places, usual, strict=True):
                setattr(place, name, function)

    def _noting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def noting(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except Exception as error:
                self._errors.append(_said(error))

        return noting


def _request(state: dict[str, Any], folder: Path) -> AsyncRequest:
    for sharded in nested_values(state):
        # Pinned memory is shared with a fork, which has to keep the values as they are now.
        if isinstance(sharded, ShardedTensor | ShardedTensorFactory):
            tensor = sharded.data
            if tensor is not None and tensor.device.type == "cpu" and tensor.is_pinned():
                sharded.data = tensor.clone()
    options: dict[str, Any] = {"async_sharded_save": True}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
        options["async_strategy"] = "mcore"  # 0.19, whose other one is a package of its own
    request = dist_checkpointing.save(state, str(folder), **options)
    return cast(AsyncRequest, request)


def _prepare_results() -> None:
    """Make Megatron's queue of results before Megatron does, whose server process would outlive a
    rank that is killed; and drop the results of a save that was given up."""
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
    """Hide `__main__` from a process that is spawned inside.

    multiprocessing imports it there again: a script without a `__main__` guard would train twice.
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
    """In the writing process: Megatron's `write`, then the checksums of what it has written."""
    lifetime.end_with_parent(rank_pid)
    started = time.perf_counter()
    error = None
    files: dict[str, FileSum] = {}
    logger, heard = logging.getLogger(filesystem_async.__name__), _Heard()
    logger.addHandler(heard)
    try:
        # They mean the training process, which waits for this one before it stops.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        os.nice(_PATIENCE)
        write(*args, **kwargs)
        names = [path.name for path in folder.iterdir() if path.name.startswith(prefix)]
        files = file_sums(folder, names)
    except BaseException as failure:
        error = _said(failure)
    # A thread's or a process's error is logged, and what is raised says but that there was one.
    error = heard.first or error
    results.send(Written(files, time.perf_counter() - started, error))


class _Heard(logging.Handler):
    """The first error that Megatron logs."""

    first: str | None = None

    def __init__(self) -> None:
        super().__init__(logging.ERROR)

    def emit(self, record: logging.LogRecord) -> None:
        self.first = self.first or record.getMessage()[:300]


def _said(error: BaseException) -> str:
    """In a few words: torch's errors go on for lines, and the result has to fit into a pipe."""
    first_line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first_line[:300]}"
